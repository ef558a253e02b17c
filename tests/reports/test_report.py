"""The page of a run: what it shows, that it needs nothing else, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import fptquant as fq
from fptquant.cli import app
from fptquant.data.text import load_text
from fptquant.data.windows import token_windows
from fptquant.errors import UserError
from fptquant.evaluation.metrics import sqnr_db
from fptquant.evaluation.samples import continuations
from fptquant.models.architectures import view_model
from fptquant.reports import page as page_content
from fptquant.reports import report
from fptquant.reports.samples import visible
from tests.models.tiny import tiny_model
from tests.tiny_folder import save_tiny_folder
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

SMALL = ["evaluation.text=topics", "evaluation.windows=2", "evaluation.window=64", "calibration.windows=2", "calibration.window=32"]
TRAINING = [
    "training.text=topics", "training.steps=2", "training.window=32", "training.batch=1", "training.held_out_windows=1",
    "training.evaluate_every=1",
    "block_training={text: topics, steps: 1, batch: 1, windows: 1, window: 32, held_out_windows: 1}",
    "range_training={text: topics, steps: 1, window: 32, held_out_windows: 1}",
]  # fmt: skip
VOID = {"meta", "link", "img", "br"}
SECTIONS = [
    "run", "results", "samples", "blocks", "sqnr", "sensitivity", "outliers", "histograms", "training", "stages", "config",
]  # fmt: skip


def quiet(done: int, total: int, description: str) -> None:
    pass


def invoke(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained, of a model whose name means something in HTML."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny_folder(folder / "a<b>&'quoted'")
    arguments = [f"model={json.dumps(str(model))}", "quantization=w4a8kv8-static", "quantization.prefix=[5]", "local.value_steps=2"]
    with pytest.MonkeyPatch.context() as patch:  # its plots take longer than all the rest, and the page makes its own
        for plot in ("plot_activations", "plot_outliers"):
            patch.setattr(f"fptquant.reports.experiment.{plot}", lambda *arguments, **options: None)
        done = invoke("run", "fptquant", *arguments, *SMALL, *TRAINING, "--output", folder / "mine")
    assert done.exit_code == 0, done.output
    return folder / "mine"


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    done = invoke("report", run, "--windows", "2", "--window", "48", "--per-layer", "--threads", "1")
    assert done.exit_code == 0, done.output
    assert f"written to {run / 'report.html'}" in done.output.replace("\n", "")
    return run / "report.html"


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers what matters."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data

    def values(self, tag: str, name: str) -> list[str]:
        return [value for each, key, value in self.attributes if (each, key) == (tag, name)]


def test_the_page_holds_every_part(run: Path, page: Path) -> None:
    parsed = Page(page.read_text(encoding="utf-8"))
    assert parsed.values("section", "id") == SECTIONS
    assert parsed.values("a", "href") == [f"#{name}" for name in SECTIONS]
    pictures = parsed.values("img", "src")
    assert (
        len(pictures) == 4 + 2 + 14 + 3
    )  # blocks, SQNR, sensitivity twice; outliers; histograms; training in blocks, end to end, of ranges
    assert all(re.match(r"data:image/(png|svg\+xml);base64,[A-Za-z0-9+/]+=*$", uri) for uri in pictures)
    assert all(parsed.values("img", "alt"))
    result = json.loads((run / "metrics.json").read_text())["results"][1]["evaluation"]
    for shown in (
        f"{result['jsd']:.4f}",
        "w4a8kv8-static, activations and cache centered, prefix of 1 token",
        "end-to-end training",
        "block training",
        "range training",
        "2 × 48 tokens",
        "v_cache",
    ):
        assert shown in parsed.words
    assert "a<b>&'quoted'" in parsed.words
    assert "value_mixing:" in parsed.words  # the config


def test_nothing_comes_from_elsewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert not {tag for tag, _, _ in parsed.attributes} & {"script", "iframe", "object", "embed", "video", "audio", "form"}
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    loaded = [value for _, name, value in parsed.attributes if name in ("src", "href", "srcset", "poster", "action")]
    assert all(value.startswith(("data:", "#")) for value in loaded)
    assert not re.search(r"https?:|@import|url\(", text)
    assert "default-src 'none'; img-src data:" in parsed.values("meta", "content")[1]


def test_twice_the_same_page(run: Path, page: Path, tmp_path: Path) -> None:
    again = fq.write_report(run, output=tmp_path / "again.html", windows=2, window=48, per_layer=True, progress=quiet)
    assert again.read_bytes() == page.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.html"]


def test_without_sensitivity_for_a_model_that_was_saved_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run, no training, no transforms, no prefix: their parts are left out. Rounded weights are compared with what they were."""
    monkeypatch.setattr(page_content, "_histograms", lambda diagnosis: [])  # the slowest figures, which the other page has
    folder = save_tiny_folder(tmp_path / "tiny")
    rounding = ["rounding.text=topics", "rounding.windows=1", "rounding.window=32"]
    config = fq.load_config("gptq", f"model={folder}", "quantization=w4a16", *SMALL, *rounding)
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
    result = fq.calibrate(model, tiny_tokenizer(), config, progress=quiet)
    result.save(tmp_path / "saved")
    metrics = json.loads((tmp_path / "saved" / "metrics.json").read_text())
    metrics["rounding"]["linears"]["layers.1.up_proj"]["damping"] = 0.1  # as if its Hessian had needed it
    metrics["rounding"]["damped_further"] = ["layers.1.up_proj"]
    (tmp_path / "saved" / "metrics.json").write_text(json.dumps(metrics))
    seen: list[str] = []
    page = fq.write_report(tmp_path / "saved", sensitivity=False, progress=lambda done, total, what: seen.append(what))
    assert page == tmp_path / "saved" / "report.html"
    parsed = Page(page.read_text(encoding="utf-8"))
    assert parsed.values("section", "id") == ["run", "samples", "blocks", "sqnr", "outliers", "histograms", "stages", "config"]
    assert len(parsed.values("img", "src")) == 2
    assert "2 × 64 tokens of" in parsed.words
    damped = "with 0.01 of their mean diagonal added, and were damped further: layers.1.up_proj 0.1"
    assert f"GPTQ: the Hessians of 1 of 14 linears were not positive definite {damped}; give more" in parsed.words
    assert "these quantizers change nothing" not in parsed.words
    weakest = re.findall(r"layers\.(\d)\.(\w+)\.weight (\d+\.\d) dB", parsed.words)
    assert len(weakest) == 5
    for layer, name, value in weakest:
        weights = (view_model(each).blocks[int(layer)].linear(name).weight.detach() for each in (model, result.model))
        assert value == f"{sqnr_db(*weights):.1f}"
    assert {"figures", "SQNR of every site", "calibrated: activations"} <= set(seen)
    prompts = token_windows(tiny_tokenizer(), load_text("topics", "evaluation"), 2, 64)[:, :32]
    full, mine = (continuations(each, tiny_tokenizer(), prompts) for each in (model, result.model))
    for number, prompt in enumerate(prompts):
        assert visible(tiny_tokenizer().decode(prompt)) in parsed.words
        said = ["gptq w4a16", visible(mine[number].text), f"{mine[number].agreement(full[number])} of 48"]
        assert re.search(r"\s*".join(re.escape(part) for part in said), parsed.words)
        assert visible(full[number].text) in parsed.words
    assert fq.load_calibrated(tmp_path / "saved")  # the page beside it is in nobody's way


def test_what_is_refused_before_any_work(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*arguments: Any, **options: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(report, "diagnose", work)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([tmp_path / "nowhere"], "there is no folder"),
        ([tmp_path], "holds no calibrated model"),
        ([run, "--output", run / "config.yaml"], "is no name of a page; give one that ends in .html"),
        ([run, "--output", tmp_path / "no" / "page.html"], "lies in a folder that does not exist"),
        ([run, "--output", tmp_path / "folder.html"], "is a folder"),
        ([run, "--output", tmp_path / "file" / "page.html"], "does not exist"),
        ([run, "--no-sensitivity", "--per-layer"], "ask for both, or for neither"),
        ([run, "--windows", "2", "--samples", "3"], "3 samples are not possible with 2 windows"),
    ):
        refused = invoke("report", *arguments)
        assert refused.exit_code == 2, refused.output
        assert message in refused.stderr.replace("\n", " ")
    damaged = shutil.copytree(run, tmp_path / "damaged", ignore=shutil.ignore_patterns("*.safetensors", "*.png"))
    (damaged / "metrics.json").write_text('{"results": [{"method"')
    with pytest.raises(UserError, match=r"the files of the run .*damaged are missing or damaged"):
        fq.write_report(damaged)
    assert (run / "config.yaml").read_text().startswith("name: fptquant")


def test_windows_that_do_not_fit(run: Path, tmp_path: Path) -> None:
    refused = invoke("report", run, "--window", "128", "--output", tmp_path / "page.html")
    assert refused.exit_code == 2
    assert "with the prefix = 129 is longer than the model's context" in refused.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_layers_in_few_characters() -> None:
    assert page_content._ranges([]) == ""
    assert page_content._ranges([7, 0, 1, 2, 5, 6, 1]) == "0-2, 5-7"


def browser() -> str | None:
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chrome"))
    return next((path for path in found if path), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium on the path")
def test_a_browser_has_nothing_to_complain_about(page: Path, tmp_path: Path) -> None:
    """Whatever fails to load or breaks the page's own policy is a message on the console."""

    def console(file: Path) -> list[str]:
        command = [
            str(browser()),
            "--headless",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=60)
        assert "</html>" in done.stdout
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    worse = tmp_path / "worse.html"
    text = page.read_text(encoding="utf-8")
    worse.write_text(text.replace("<main>", '<main><img src="https://127.0.0.1:9/x.png">'), encoding="utf-8")
    assert any("Content Security Policy" in line for line in console(worse))
    assert console(page) == []
