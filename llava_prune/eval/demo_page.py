"""The page of `llava-prune demo`, in gradio, which is an extra of the package and imported inside functions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from html import escape
from typing import Any

from ..methods.registry import names
from .demo import Demo, Shown, message

GRADIO = 6
"""Major version of gradio that the page is written for."""
UPLOAD = "20mb"
"""Largest image file."""
KEPT = (600, 3600)
"""Seconds between clean-ups of uploaded images, and age at which they are deleted."""
COLOURS = ("#8A8F98", "#0072B2", "#D55E00")
"""Curves of the unpruned model, A and B; they stand out from white and from black."""
CSS = """
.facts table { width: 100%; font-size: 0.9rem; border-collapse: collapse; }
.facts th { text-align: left; font-weight: normal; padding: 0.15rem 0.5rem 0.15rem 0; }
.facts td { text-align: right; padding: 0.15rem 0; }
"""


def check_gradio() -> None:
    """Refuse to go on without gradio.

    Raises:
        ValueError: with the way out.
    """
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the demo needs gradio; pip install 'llava-prune[demo]'") from error
    if gradio.__version__.partition(".")[0] != str(GRADIO):
        raise ValueError(
            f"the demo needs gradio {GRADIO}, and {gradio.__version__} is installed; pip install 'llava-prune[demo]'"
        )


def build(demo: Demo, methods: Sequence[str], budget: str, examples: Sequence[Sequence[Any]], short: bool) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        demo: what answers.
        methods: names that A and B have at first.
        budget: that both have at first.
        examples: image, question and `short` of each.
        short: whether short answers are asked for at first.
    """
    import gradio as gr

    with gr.Blocks(analytics_enabled=False, title="Visual token pruning", delete_cache=KEPT) as page:
        gr.Markdown("# Visual token pruning\nOne question, answered by the unpruned model and by two methods.")
        shown = gr.State(None)
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"])
            with gr.Column():
                question = gr.Textbox(label="Question", placeholder="What color is the circle?", max_lines=4)
                brief = gr.Checkbox(short, label="Ask for a single word or phrase")
                chosen = [_method(letter, name, budget) for letter, name in zip("AB", methods, strict=True)]
                button = gr.Button("Ask", variant="primary")
                if examples:
                    gr.Examples([list(row) for row in examples], [image, question, brief], cache_examples=False)
        layers = demo.loaded.size.layers
        with gr.Row(equal_height=False):
            cards = [_card(name, layers) for name in ("Unpruned", "A", "B")]
        axes = {"x_title": "decoder layer", "y_title": "visual tokens leaving a layer", "color_title": "model"}
        plot = gr.LinePlot(x="layer", y="tokens", color="model", label="Retention", height=260, **axes)
        gr.Markdown(
            "Times are those of a single request, after a warm-up prefill. Reading and preprocessing the image is not "
            "counted. The prefill is that of the language model."
        )
        sliders = [card[2] for card in cards[1:]]
        inputs = [image, question, brief, *(c for pair in chosen for c in pair), *sliders]
        outputs = [shown, plot, *(c for card in cards for c in (*card[:2], *card[3:]))]
        gr.on(
            [button.click, question.submit],
            functools.partial(_answer, demo),
            inputs,
            outputs,
            concurrency_limit=1,  # a model has one method at a time
            api_visibility="private",
        )
        for number, card in enumerate(cards[1:]):
            card[2].input(
                functools.partial(_draw, number),
                [shown, card[2]],
                card[3],
                show_progress="hidden",
                trigger_mode="always_last",
                api_visibility="private",
            )
    return page


def _method(letter: str, name: str, budget: str) -> tuple[Any, Any]:
    """The fields of a method: its name and its budget."""
    import gradio as gr

    with gr.Row():
        method = gr.Dropdown(
            sorted({*names(), name}), value=name, label=f"Method {letter}", allow_custom_value=True, min_width=140
        )
        tokens = gr.Textbox(budget, label=f"Budget of {letter} (visual tokens, as 64 or 11%)", min_width=140)
    return method, tokens


def _card(name: str, layers: int) -> list[Any]:
    """What is shown of an answer: text and facts; of a method also a slider and the overlay."""
    import gradio as gr

    with gr.Column(min_width=240):
        parts = [gr.Textbox(label=name, interactive=False, lines=2), gr.HTML(elem_classes="facts")]
        if name in "AB":
            parts += [
                gr.Slider(0, layers - 1, layers // 2, step=1, label=f"Layer of {name}", buttons=[]),
                gr.Image(label=f"Patches that {name} keeps", interactive=False, buttons=["fullscreen"]),
            ]
    return parts


def _answer(demo: Demo, image: str | None, question: str, short: bool, *given: Any) -> list[Any]:
    """The outputs of the page for a question; `given` are method, budget, method, budget, layer, layer."""
    import gradio as gr
    import pandas as pd

    chosen = [(given[0] or "", given[1]), (given[2] or "", given[3])]
    try:
        shown = demo.ask(image, question, short, chosen)
        curves = pd.DataFrame(shown.curves())
        out: list[Any] = [
            shown,
            gr.LinePlot(curves, color_map=dict(zip(curves["model"].unique(), COLOURS, strict=False))),
        ]
        for number, answer in enumerate(shown.answers):
            label = "Unpruned" if not number else f"{'AB'[number - 1]}: {answer['name']}"
            out += [gr.Textbox(answer["answer"], label=label), shown.facts(number)]
            if number:
                out.append(_overlay(shown, number - 1, int(given[3 + number])))
    except Exception as error:
        raise _shown(error) from error
    return out


def _draw(number: int, shown: Shown | None, layer: float) -> Any:
    """The overlay after a layer; nothing before the first answer."""
    if shown is None:
        return None
    try:
        return _overlay(shown, number, int(layer))
    except Exception as error:
        raise _shown(error) from error


def _overlay(shown: Shown, number: int, layer: int) -> Any:
    import gradio as gr

    drawn, words = shown.overlay(number, layer)
    return gr.Image(drawn, label=words, alt_text=f"Patches kept: {words}")


def _shown(error: Exception) -> Any:
    """An error as gradio shows it; its messages are HTML."""
    import gradio as gr

    return gr.Error(escape(message(error)), duration=None, print_exception=False)


def serve(page: Any, host: str, port: int) -> str:
    """Start the server in the background; returns its address.

    Raises:
        ValueError: when the port has been taken in the meantime.
    """
    import gradio as gr

    font = ("system-ui", "sans-serif")  # no font is fetched
    theme = gr.themes.Default(font=font, font_mono=("ui-monospace", "monospace"))
    try:
        _, address, _ = page.queue(api_open=False).launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, show_error=True, share=False,
            inbrowser=False, footer_links=[], run_history=False, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, max_file_size=UPLOAD, theme=theme, css=CSS,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"port {port} of {host} cannot be used; give another with --port") from error
    return str(address)
