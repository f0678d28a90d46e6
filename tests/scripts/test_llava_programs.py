"""LLaVA's own entry points run pruned without changes and give the answers of this package's evaluation."""

import base64
import contextlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_prune
from llava_prune import cli, llava_programs, llava_scripts
from llava_prune.eval.images import open_rgb, pixels
from llava_prune.eval.prompt import first_turn, token_ids
from llava_prune.models.config import SMALL

pytest.importorskip("llava")
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "playground" / "models" / "llava-tiny"
MINI = ROOT / "playground" / "data" / "mini"
GQA = MINI / "gqa"
NEW = 4


@pytest.fixture(scope="module")
def questions():
    text = (GQA / "llava_gqa_testdev_balanced.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()[:3]]


def answers(rows):
    """Return the answers of this package to questions about images."""
    loaded = llava_prune.load(MODEL, family="llava", dtype=torch.float32, device="cpu")
    said = []
    with llava_prune.pruned(loaded.model, "autoprune", tokens=64) as handle:
        for row in rows:
            image = open_rgb(GQA / "data" / "images" / row["image"])
            ids = token_ids(first_turn(row["text"]), loaded.tokenizer)
            values = pixels(image, loaded.image_processor, True)[None]
            new = loaded.generate([ids], values, sizes=[image.size], max_new_tokens=NEW)
            assert handle.last.tokens_out[0].float().mean() <= 64.5
            said.append(loaded.tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip())
    return said


@pytest.fixture(scope="module")
def ours(questions):
    return answers(questions)


def run(*program: str, typed: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llava_prune", "run", "--method", "autoprune", "--tokens", "64", "--"]
    command += ["python", "-m", *program]
    return subprocess.run(command, cwd=ROOT, input=typed, capture_output=True, text=True, timeout=400, check=False)


def test_model_vqa_loader(questions, ours, tmp_path):
    asked, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    done = run(
        "llava.eval.model_vqa_loader", "--model-path", str(MODEL), "--conv-mode", "vicuna_v1",
        "--question-file", str(asked), "--image-folder", str(GQA / "data" / "images"),
        "--answers-file", str(answers), "--temperature", "0", "--max_new_tokens", str(NEW),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in questions]
    assert [row["text"].strip() for row in rows] == ours
    assert "64.0 leaving" in " ".join(done.stderr.split())


@pytest.fixture
def projector_only(tmp_path):
    """Return a checkpoint that is only a float16 projector; its config names the vision tower by a relative path."""
    folder = tmp_path / "llava-tiny-projector"
    folder.mkdir()
    shutil.copy(MODEL / "config.json", folder)
    weights = load_file(MODEL / "model.safetensors")
    torch.save({k: v.half() for k, v in weights.items() if "mm_projector" in k}, folder / "mm_projector.bin")
    return folder


def test_weights_that_torch_load_reads(projector_only, questions, ours):
    row = questions[0]
    done = run(
        "llava.eval.run_llava", "--model-path", str(projector_only), "--model-base", str(MODEL), "--conv-mode",
        "vicuna_v1", "--query", row["text"], "--image-file", str(GQA / "data" / "images" / row["image"]),
        "--temperature", "0", "--max_new_tokens", str(NEW),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith(ours[0])


def test_an_adapter_alone_is_refused(projector_only):
    with pytest.raises(ValueError, match="adapter, without the weights of its base model"):
        llava_prune.load(projector_only, device="cpu")


def test_run_llava(questions, ours):
    row = questions[0]
    done = run(
        "llava.eval.run_llava", "--model-path", str(MODEL), "--conv-mode", "vicuna_v1", "--query", row["text"],
        "--image-file", str(GQA / "data" / "images" / row["image"]), "--temperature", "0",
        "--max_new_tokens", str(NEW),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith(ours[0])


def test_cli():
    """A second question about the image is a prefill of the whole conversation."""
    row = {"image": "n9000003.jpg", "text": "What is the yellow object?"}
    done = run(
        "llava.serve.cli", "--model-path", str(MODEL), "--conv-mode", "vicuna_v1", "--image-file",
        str(GQA / "data" / "images" / row["image"]), "--temperature", "0", "--max-new-tokens", str(NEW),
        typed=f"{row['text']}\nWhat color is it?\n\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = re.findall(r"ASSISTANT: (.+)", done.stdout)
    assert first == answers([row])[0] and second and done.stdout.rstrip().endswith("exit...")
    assert "64.0 leaving" in " ".join(done.stderr.split())


def test_model_vqa(questions, ours, tmp_path):
    asked, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    done = run(
        "llava.eval.model_vqa", "--model-path", str(MODEL), "--conv-mode", "vicuna_v1", "--question-file", str(asked),
        "--image-folder", str(GQA / "data" / "images"), "--answers-file", str(answers), "--temperature", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [row["text"].strip() for row in rows] == ours  # 1,024 new tokens: answers end by themselves
    assert "64.0 leaving" in " ".join(done.stderr.split())


def test_model_vqa_mmbench(tmp_path):
    """The program makes its own prompts from the file, and its answers equal those of this package's evaluation."""
    pytest.importorskip("pandas")
    lines = (MINI / "mmbench" / "mmbench_dev_20230712.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    folder = tmp_path / "data" / "mmbench"
    folder.mkdir(parents=True)
    words = [
        x for x in lines[1:] if not any(option.isdecimal() for option in x.split("\t")[3:7])
    ]  # pandas parses numbers
    (folder / "mmbench_dev_20230712.tsv").write_text("".join([lines[0], *words[:3]]), encoding="utf-8")
    answers = tmp_path / "answers.jsonl"
    done = run(
        "llava.eval.model_vqa_mmbench", "--model-path", str(MODEL), "--conv-mode", "vicuna_v1", "--question-file",
        str(folder / "mmbench_dev_20230712.tsv"), "--answers-file", str(answers), "--single-pred-prompt",
        "--temperature", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    command = ["eval", "mmbench", "--model", str(MODEL), "--data", str(tmp_path / "data"), "--tokens", "64"]
    assert cli.main([*command, "--no-reference", "--batch", "1", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "autoprune-64" / "answers.jsonl").read_text(encoding="utf-8")
    mine = [json.loads(line) for line in text.splitlines()]
    assert len(mine) == 3 and [r["text"] for r in mine] == [r["text"] for r in theirs]


# scripts --------------------------------------------------------------------------------------------------------


def test_a_script_that_starts_programs(questions, ours, tmp_path):
    """A script can start several programs at once, as LLaVA's do for GPUs; other uses of Python are not changed."""
    asked, script = tmp_path / "questions.jsonl", tmp_path / "all.sh"
    asked.write_text("".join(json.dumps(row) + "\n" for row in questions[:2]), encoding="utf-8")
    script.write_text(
        f"""
for part in 0 1; do
    python -m llava.eval.model_vqa_loader --model-path '{MODEL}' --question-file questions.jsonl --num-chunks 2 \\
        --chunk-idx $part --image-folder '{GQA / "data" / "images"}' --answers-file "./answers $part.jsonl" \\
        --conv-mode vicuna_v1 --temperature 0 --max_new_tokens {NEW} &
done
wait
python3 -c "import sys; print('plain', sys.argv[1:])" -m llava.eval.model_vqa_loader "two words"
exit 3
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "llava_prune", "run", "--tokens", "64", "--", "bash", "all.sh"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 3, done.stderr[-2000:]
    assert done.stdout == "plain ['-m', 'llava.eval.model_vqa_loader', 'two words']\n"
    texts = [(tmp_path / f"answers {part}.jsonl").read_text(encoding="utf-8") for part in (0, 1)]
    assert [json.loads(text)["text"].strip() for text in texts] == ours[:2]
    assert " ".join(done.stderr.split()).count("64.0 leaving") == 2


def test_modules_that_load_a_model():
    found = llava_scripts.pruned_modules()
    assert {f"llava.eval.{n}" for n in ("model_vqa_loader", "model_vqa", "model_vqa_science", "run_llava")} < set(found)
    assert {"llava.serve.cli", "llava.serve.model_worker"} < set(found) and "llava.serve.controller" not in found


def test_a_command_that_is_not_there():
    with pytest.raises(ValueError, match="nosuch: no such command; give python -m llava.MODULE"):
        llava_scripts.run_script(["nosuch"], [])


def test_a_script_that_a_signal_ends():
    assert llava_scripts.run_script(["sh", "-c", "kill -9 $$"], []) == 137


def test_a_program_that_is_not_llavas_is_refused():
    done = run("json.tool")
    assert done.returncode == 1 and "json.tool" in done.stderr and "llava.eval" in done.stderr


def test_the_last_question_has_no_image(questions, tmp_path):
    """The report describes the last prompt with an image, because ScienceQA has questions without one."""
    row = questions[0]
    asked, answers = tmp_path / "questions.json", tmp_path / "answers.jsonl"
    first = {"id": "1", "image": row["image"], "conversations": [{"value": "<image>\n" + row["text"]}]}
    asked.write_text(json.dumps([first, {"id": "2", "conversations": [{"value": "What is it?"}]}]), encoding="utf-8")
    program = ["llava.eval.model_vqa_science", "--model-path", str(MODEL), "--conv-mode", "vicuna_v1", "--temperature"]
    program += ["0", "--image-folder", str(GQA / "data" / "images"), "--answers-file", str(answers)]
    done = run(*program, "--question-file", str(asked))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(answers.read_text(encoding="utf-8").splitlines()) == 2
    shown = " ".join(done.stderr.split())
    assert "64.0 leaving" in shown and "pruned nothing" not in shown
    asked.write_text(json.dumps([{"id": "2", "conversations": [{"value": "What is it?"}]}]), encoding="utf-8")
    assert "pruned nothing: no prompt had an image" in " ".join(
        run(*program, "--question-file", str(asked)).stderr.split()
    )


# servers --------------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


def post(port: int, path: str, given: object = None) -> bytes:
    data = json.dumps(given).encode()
    asked = urllib.request.Request(f"http://localhost:{port}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=20) as reply:
        return reply.read()


@contextlib.contextmanager
def serving(folder: Path, name: str, port: int, *more: str):
    """Run a server of package llava under `llava-prune run`, with its log files in `folder`."""
    command = [sys.executable, "-m", "llava_prune", "run", "--method", "autoprune", "--tokens", "64", "--", "python"]
    command += ["-m", f"llava.serve.{name}", "--host", "localhost", "--port", str(port), *more]
    with open(folder / f"{name}.out", "wb") as out:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=env)
        try:
            end = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError):
                    post(port, "worker_get_status")
                    break
                text = (folder / f"{name}.out").read_text(encoding="utf-8", errors="replace")
                assert server.poll() is None and time.monotonic() < end and len(text) < 100_000, text[-2000:]
                time.sleep(0.1)
            yield server
        finally:
            server.kill()
            server.wait()


def test_controller_and_model_worker(questions, ours, tmp_path):
    """Requests arrive in threads of the server, and each starts a thread that generates."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    front, back = free_ports(2)

    def ask(row: dict) -> str:
        image = base64.b64encode((GQA / "data" / "images" / row["image"]).read_bytes()).decode()
        prompt = first_turn(row["text"])
        given = {"model": "llava-tiny", "prompt": prompt, "images": [image], "stop": "</s>", "temperature": 0}
        parts = post(back, "worker_generate_stream", {**given, "max_new_tokens": NEW}).split(b"\0")
        last = json.loads([p for p in parts if p][-1])
        assert last["error_code"] == 0, last
        return last["text"].removeprefix(prompt).strip()

    address = ["--controller-address", f"http://localhost:{front}", "--worker-address", f"http://localhost:{back}"]
    with (
        serving(tmp_path, "controller", front),
        serving(tmp_path, "model_worker", back, *address, "--model-path", str(MODEL)),
    ):
        assert json.loads(post(front, "list_models")) == {"models": ["llava-tiny"]}
        with ThreadPoolExecutor(2) as pool:  # two at a time
            assert list(pool.map(ask, questions)) == ours
        logs = sorted(tmp_path.iterdir())
        sizes = [f.stat().st_size for f in logs]
    assert {f.name.split("_")[0].split(".")[0] for f in logs} == {"controller", "model"} and len(logs) == 4
    assert 0 < sum(sizes) < 100_000, sizes


def test_log_records_go_to_the_stream_of_the_start(monkeypatch, capsys):
    """If a program replaces sys.stderr by a stream that logs, records still go to the original stream."""
    seen = []

    class Logging:
        def write(self, text):
            seen.append(text)

        def flush(self): ...

    def command(args):
        monkeypatch.setattr(sys, "stderr", Logging())
        logging.getLogger("program").warning("a record")
        monkeypatch.undo()
        return 0

    monkeypatch.setitem(cli.COMMANDS, "flops", command)
    root = logging.getLogger()
    kept, root.handlers = root.handlers, []
    try:
        assert cli.main(["flops"]) == 0
        assert root.handlers == []
    finally:
        root.handlers = kept
    assert "a record" in capsys.readouterr().err and not seen


# the CPU --------------------------------------------------------------------------------------------------------


def test_threads_of_the_program_run_on_the_cpu():
    """Threads of any class use the CPU; reading a file as stored in one thread changes nothing in another."""
    cpu, made, inside, go = llava_programs.OnCPU(), [], threading.Event(), threading.Event()
    cpu.dtype = torch.bfloat16

    def work():
        made.append(torch.zeros(2, dtype=torch.float16, device="cuda").dtype)

    def slow(*_):
        inside.set()
        go.wait(10)
        return torch.zeros(2, dtype=torch.float16)

    class Own(threading.Thread):
        def run(self):
            work()

    def start(thread):
        cpu.start(threading.Thread.start, thread)
        return thread

    reader = start(threading.Thread(target=lambda: made.append(cpu.load(slow).dtype)))
    assert inside.wait(10)
    for thread in (threading.Thread(target=work), Own()):
        start(thread).join(10)
        assert "run" not in vars(thread)
    with cpu.suspended():  # threads that read weights
        start(threading.Thread(target=lambda: made.append(torch.zeros(2, dtype=torch.float16).dtype))).join(10)
    assert made.pop() is torch.float16
    go.set()
    reader.join(10)
    assert made == [torch.bfloat16, torch.bfloat16, torch.float16]


def test_stored_bytes_keep_their_dtype(tmp_path):
    save_file({"x": torch.arange(6.0).half().reshape(2, 3)}, tmp_path / "x.safetensors")
    with llava_programs.OnCPU() as cpu:
        read = load_file(tmp_path / "x.safetensors")["x"]
        assert cpu.dtype is read.to("cuda", torch.float16).dtype is torch.float32
    assert read.dtype is torch.float16 and read.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("size", "stored", "dtype"),
    [(SMALL - 1, "float16", torch.float32), (SMALL, "float16", torch.bfloat16), (SMALL, "float32", torch.float32)],
)
def test_dtype_is_that_of_load(tmp_path, size, stored, dtype):
    """The dtype depends on the size of the weight files, not on the number of parameters."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llava_llama", "torch_dtype": stored}), encoding="utf-8")
    with open(tmp_path / "pytorch_model.bin", "wb") as file:
        file.truncate(size)  # a sparse file
    model, cpu = torch.nn.Linear(2, 2).half(), llava_programs.OnCPU()
    cpu.cast(model, tmp_path, config)
    assert model.weight.dtype is cpu.dtype is dtype


def test_the_files_of_the_base_count(tmp_path):
    """A small adapter for a large base model runs in bfloat16."""
    folders = {name: tmp_path / name for name in ("adapter", "base")}
    for name, size in (("adapter", 10), ("base", SMALL)):
        folders[name].mkdir()
        (folders[name] / "config.json").write_text('{"torch_dtype": "float16"}', encoding="utf-8")
        with open(folders[name] / "weights.bin", "wb") as file:
            file.truncate(size)
    for base, dtype in ((None, torch.float32), (str(folders["base"]), torch.bfloat16)):
        cpu, model = llava_programs.OnCPU(), torch.nn.Linear(2, 2).half()
        with pytest.raises(ValueError, match="Linear"):  # attach refuses it after the cast
            given = (lambda *a, model=model, **k: (None, model, None, 1), "full", {}, [], [], cpu)
            llava_programs._load(*given, str(folders["adapter"]), base)
        assert model.weight.dtype is cpu.dtype is dtype


# messages -------------------------------------------------------------------------------------------------------


def refusal(program):
    with pytest.raises(ValueError) as caught:
        llava_programs.run(["python", "-m", program], "autoprune")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["llava.eval.model_vqa_loadr", "llava.evall.x", "llava.eval", "llava.", "llava..x"])
def test_a_module_that_llava_does_not_have(name):
    assert f"package llava has no module {name}; give one" in (said := refusal(name))
    assert "llava.eval.model_vqa_loader" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import nosuch.part", "llava.serve.probe cannot run: package nosuch is not installed; pip install nosuch"),
        (
            "from yaml import nosuch",
            "cannot import name 'nosuch' from 'yaml' .*; install a version of yaml that has it",
        ),
        ("import yaml.nosuch", "No module named 'yaml.nosuch'; install a version of yaml that has it"),
        ("raise ImportError('no\\nname')", "llava.serve.probe cannot run: no name$"),
    ],
)
def test_what_a_program_imports(line, message, tmp_path, monkeypatch):
    import llava.serve

    (tmp_path / "probe.py").write_text(line + "\n", encoding="utf-8")
    monkeypatch.setattr(llava.serve, "__path__", [*llava.serve.__path__, str(tmp_path)])
    monkeypatch.setattr(llava_programs, "_check_module", lambda name: None)
    before = sys.stderr, sys.stdout, threading.Thread.start
    with pytest.raises(ValueError, match=message) as caught:
        llava_programs.run(["python", "-m", "llava.serve.probe"])
    assert "\n" not in str(caught.value) and before == (sys.stderr, sys.stdout, threading.Thread.start)


@pytest.mark.parametrize("name", ["fastapi", "gradio"])
def test_packages_that_are_not_installed(name):
    """A missing package is reported when the program imports it, whatever else is installed."""
    line = f"import sys; sys.modules[{name!r}] = None; from llava_prune.cli import main; raise SystemExit(main())"
    program = {"gradio": "llava.serve.gradio_web_server"}.get(name, "llava.serve.controller")
    command = [sys.executable, "-c", line, "run", "--", "python", "-m", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last == f"llava-prune: {program} cannot run: package {name} is not installed; pip install {name}"


def test_a_budget_beside_a_preset_that_states_one():
    with pytest.raises(ValueError, match="fastv:192 states tokens=192 itself; leave out either"):
        llava_programs.run(["llava.eval.run_llava"], "fastv:192", {"tokens": 64})


def test_arguments_of_the_program_are_its_own():
    done = run("llava.eval.model_vqa_loader", "--nosuch")
    assert done.returncode == 2 and done.stderr.strip().endswith("unrecognized arguments: --nosuch")
