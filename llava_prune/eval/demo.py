"""`llava-prune demo`: a local web page that compares the answers of the unpruned model and of two methods.

The page is made with gradio, an extra of the package that is imported inside functions.
"""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import socket
from collections.abc import Sequence
from html import escape
from typing import Any

from ..console import stdout
from ..methods.planner import cases
from ..methods.registry import names
from .asking import load_model
from .command import settings_of
from .protocol import protocol_of
from .side_by_side import NAMES, Shown, SideBySide, examples, message

log = logging.getLogger(__name__)

GRADIO = 6
"""Major version of gradio that the page is written for."""
UPLOAD = "20mb"
"""Largest image file."""
KEPT = (600, 3600)
"""Seconds between clean-ups of uploaded images, and the age at which they are deleted."""
TABS = 100
"""Number of browser tabs whose last image and records are kept in memory for the sliders."""
LOCAL = ("127.0.0.1", "localhost", "::1")
"""Hosts that other machines cannot reach."""
SECONDS = 20
"""Seconds for which an error is shown."""
COLOURS = dict(zip(NAMES, ("#8A8F98", "#0072B2", "#D55E00"), strict=True))
"""Colours of the curves, which stand out from white and from black."""
CSS = """
.facts { font-size: 0.9rem; padding: 0 0.25rem; }
.facts table { width: 100%; border-collapse: collapse; }
.facts :is(th, td) { padding: 0.15rem 0; border-bottom: 1px solid var(--border-color-primary); }
.facts th { text-align: left; font-weight: normal; white-space: nowrap; padding-right: 0.5rem; }
.facts td { text-align: right; }
"""
HEAD = """
# Visual token pruning
One question, answered by the unpruned model and by two methods. A budget is a number of visual tokens, such as 64, or a
share of them, such as 11%.
"""
FOOT = """
Dropped patches are grey and dark, and those of merged tokens are tinted. FLOPs are those of a prefill in the language
model. Each time is measured once, after a warm-up prefill. Reading and preprocessing the image is not timed.
`llava-prune bench` measures medians.
"""


def check_gradio() -> None:
    """Raise an error unless the supported version of gradio is installed.

    Raises:
        ValueError: with the command that installs it.
    """
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the demo needs gradio; pip install 'llava-prune[demo]'") from error
    if gradio.__version__.partition(".")[0] != str(GRADIO):
        raise ValueError(
            f"the demo needs gradio {GRADIO}, and {gradio.__version__} is installed; pip install 'llava-prune[demo]'"
        )


def build(asked: SideBySide, methods: Sequence[str], budget: str, offered: Sequence[Sequence[Any]], short: bool) -> Any:
    """Build the page, a `gradio.Blocks`.

    Args:
        asked: the loaded model, which answers the questions.
        methods: initial names of methods A and B.
        budget: initial budget of both.
        offered: examples, each with image, question and `short`.
        short: whether the page initially asks for short answers.
    """
    import gradio as gr

    layers = asked.loaded.size.layers
    with gr.Blocks(analytics_enabled=False, title="Visual token pruning", delete_cache=KEPT) as page:
        gr.Markdown(HEAD)
        shown = gr.State(None)
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=280
                )
            with gr.Column():
                question = gr.Textbox(label="Question", placeholder="What color is the circle?", max_lines=4)
                brief = gr.Checkbox(short, label="Ask for a single word or phrase")
                chosen = [_method(letter, name, budget) for letter, name in zip("AB", methods, strict=True)]
                button = gr.Button("Ask", variant="primary")
        if offered:
            gr.Examples(
                [list(row) for row in offered],
                [image, question, brief],
                cache_examples=False,
                example_labels=[str(row[1]) for row in offered],  # buttons, which the keyboard can reach
            )
        with gr.Row():
            with gr.Column(min_width=280):
                unpruned = _answered("Unpruned")
                axes = {"x_title": "decoder layer", "y_title": "visual tokens leaving a layer", "color_title": "model"}
                plot = gr.LinePlot(x="layer", y="tokens", color="model", label="Retention", color_map=COLOURS, **axes)
            pruned = []
            for letter in "AB":
                with gr.Column(min_width=280):
                    pruned.append((*_answered(letter), *_overlaid(letter, layers)))
        gr.Markdown(FOOT)
        _connect(asked, button, [image, question, brief, *chosen[0], *chosen[1]], [shown, plot, *unpruned], pruned)
    return page


def _connect(
    asked: SideBySide, button: Any, inputs: Sequence[Any], outputs: Sequence[Any], pruned: Sequence[Any]
) -> None:
    """Connect the button and the question's field to `_answer`, and the sliders to `_draw`.

    Args:
        asked: the loaded model, which answers the questions.
        button: the "Ask" button.
        inputs: fields for image, question, `short`, and method and budget of A and B.
        outputs: state of the page, plot, and answer and facts of the unpruned model.
        pruned: answer, facts, slider, overlay and its caption, for A and for B.
    """
    import gradio as gr

    gr.on(
        [button.click, inputs[1].submit],
        functools.partial(_answer, asked),
        [*inputs, *(parts[2] for parts in pruned)],
        [*outputs, *(part for parts in pruned for part in (*parts[:2], *parts[3:]))],
        concurrency_limit=1,  # a model has one method at a time
        show_progress_on=[outputs[2], *(parts[0] for parts in pruned)],
        api_visibility="private",
    )
    for number, (_, _, slider, *overlay) in enumerate(pruned):
        slider.input(
            functools.partial(_draw, number),
            [outputs[0], slider],
            overlay,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )


def _method(letter: str, name: str, budget: str) -> tuple[Any, Any]:
    """Return the fields of a method: its name and its budget."""
    import gradio as gr

    choices = sorted({*names(), name})
    with gr.Row():
        method = gr.Dropdown(choices, value=name, label=f"Method {letter}", allow_custom_value=True, min_width=120)
        tokens = gr.Textbox(budget, label=f"Budget of {letter}", min_width=120)
    return method, tokens


def _answered(name: str) -> tuple[Any, Any]:
    """Return the fields of an answer: its text and its facts."""
    import gradio as gr

    text = gr.Textbox(label=name, interactive=False, lines=2)
    return text, gr.HTML(elem_classes="facts", apply_default_css=False)


def _overlaid(letter: str, layers: int) -> tuple[Any, Any, Any]:
    """Return the fields of a method's overlay: slider, image and caption."""
    import gradio as gr

    slider = gr.Slider(0, layers - 1, layers // 2, step=1, label=f"Layer of {letter}", buttons=[])
    image = gr.Image(
        label=f"Patches that {letter} keeps", show_label=False, interactive=False, buttons=["fullscreen"], height=300
    )
    return slider, image, gr.HTML(elem_classes="facts", apply_default_css=False)


def _answer(asked: SideBySide, image: str | None, question: str, short: bool, *given: Any) -> list[Any]:
    """Answer a question and return the new values of the page's outputs.

    `given` holds method and budget of A, method and budget of B, and the layers of both sliders.
    """
    import gradio as gr
    import pandas as pd

    words = [(text or "").strip() for text in given[:4]]
    chosen = [(words[0], words[1]), (words[2], words[3])]
    try:
        shown = asked.ask(image, question or "", short, chosen)
        out: list[Any] = [shown, pd.DataFrame(shown.curves())]
        for number, answer in enumerate(shown.answers):
            out += [gr.Textbox(answer["answer"], label=shown.label(number)), shown.facts(number)]
            if number:
                out += _overlay(shown, number, int(given[3 + number]))
    except Exception as error:
        raise _shown(error) from error
    return out


def _draw(number: int, shown: Shown | None, layer: float) -> list[Any]:
    """Return the overlay of a method after a layer; empty fields before the first answer."""
    if shown is None:
        return [None, ""]
    try:
        return _overlay(shown, number + 1, int(layer))
    except Exception as error:
        raise _shown(error) from error


def _overlay(shown: Shown, number: int, layer: int) -> list[Any]:
    """Return image and caption of an overlay."""
    import gradio as gr

    drawn, words = shown.overlay(number, layer)
    return [gr.Image(drawn, alt_text=f"Patches kept by {words}"), escape(words)]


def _shown(error: Exception) -> Any:
    """Wrap an error for gradio, which renders messages as HTML."""
    import gradio as gr

    return gr.Error(escape(message(error)), duration=SECONDS, print_exception=False)


def serve(page: Any, host: str, port: int) -> str:
    """Start the server in a background thread and return its address.

    Raises:
        ValueError: if another program has taken the port in the meantime.
    """
    import gradio as gr

    font = ("system-ui", "sans-serif")  # no font is fetched
    theme = gr.themes.Default(font=font, font_mono=("ui-monospace", "monospace"))
    try:
        _, address, _ = page.queue(api_open=False).launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, show_error=True, share=False,
            inbrowser=False, footer_links=[], run_history=False, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, max_file_size=UPLOAD, state_session_capacity=TABS, theme=theme, css=CSS,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"port {port} of {host} cannot be used; give another with --port") from error
    return str(address)


def check_port(host: str, port: int) -> None:
    """Refuse an address on which no server can listen.

    Raises:
        ValueError: naming host or port.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror or error}; give an address of this machine") from error
    with socket.socket(family, kind, proto) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(f"--host {host} is not an address of this machine; give 127.0.0.1") from error
            reason = str(error.strerror or error).lower()
            raise ValueError(f"port {port} of {host} cannot be used ({reason}); give another with --port") from error


def demo(args: argparse.Namespace) -> int:
    """Run `llava-prune demo` until it is interrupted; return its exit status.

    Raises:
        ValueError: for bad input, a port that is taken, or if gradio is not installed.
    """
    check_gradio()
    if len(args.method) > 2:
        raise ValueError(f"--method {','.join(args.method)}: the page compares two methods; give at most two")
    hyper = args.method_args or {}
    cases(args.method, [64], hyper)  # raises for an unknown name or hyper-parameter before the model is loaded
    check_port(args.host, args.port)
    settings = settings_of(args, methods=args.method, tokens=[64])
    protocol = protocol_of(settings.model, settings.conv_mode)
    loaded = load_model(settings)
    served = SideBySide(loaded, settings.model, protocol, args.new, hyper, args.seed)
    first = (args.method * 2)[:2]
    served.runs([(name, args.tokens) for name in first])
    page = build(served, first, args.tokens, examples(args.data), args.short)
    address = serve(page, args.host, args.port)
    if args.host not in LOCAL:
        log.warning("whoever reaches %s can use the model; there is no password", args.host)
    stdout().print(f"{address} (Ctrl+C ends it)", markup=False, highlight=False, soft_wrap=True)
    page.block_thread()
    return 0
