"""report.html, sample tables and model cards: whole, escaped, and in need of nothing else."""

import html.parser
import json
import math

import peft
import pytest
import torch
import yaml

from hydra_rlhf import cards, ppo, report
from hydra_rlhf.experience import some_samples
from hydra_rlhf.model import Score
from hydra_rlhf.records import Tracker, read_lines
from hydra_rlhf.rollout import Rollout
from tests.rlhf.families import PROMPTS, make_tokenizer
from tests.rlhf.test_ppo import plain_model, settings, word_reward

NASTY = '</table><script src="http://evil.example/x.js">alert(1)</script>&"\''


class Page(html.parser.HTMLParser):
    """Tags that were closed wrongly, what a browser would fetch, and the text."""

    VOID = {"meta", "circle", "line", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.fetched, self.tags, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A PPO run with everything that a report shows, and text that means harm."""
    folder = tmp_path_factory.mktemp("run")
    config = settings(max_steps=5, sample_steps=2, num_samples=3, sft_model_path="org/base")
    with Tracker(folder, {"ppo": config, "input": {"prompts": NASTY}}) as tracker:
        result = ppo.train(
            config,
            plain_model(),
            make_tokenizer(),
            PROMPTS,
            reward_fn=word_reward,
            on_step=lambda step, metrics: tracker.log(step, metrics, "ppo"),
            on_samples=lambda step, rows: tracker.log_samples(step, rows, "ppo"),
        )
        rows = [{"prompt": NASTY, "response": NASTY, "score": float("nan"), "kl": None}]
        tracker.log_samples(6, rows, "ppo")
        tracker.report([NASTY])
        result.models.save(folder, base_model=config.sft_model_path)
        cards.write_cards(folder, config, result.metrics[-1], "prompts.jsonl")
    return folder


def test_report_is_one_page_that_fetches_nothing(run_dir):
    text = (run_dir / "report.html").read_text()
    page = Page(text)
    assert not page.wrong and not page.open
    assert page.fetched == [] and "url(" not in text and "@import" not in text
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "default-src 'none'" in text
    assert page.tags.count("svg") >= 6


def test_report_shows_curves_samples_configuration_and_memory(run_dir):
    page = Page((run_dir / "report.html").read_text())
    for title in ("Figures", "Curves", "Memory by phase", "Samples", "Configuration", "The run"):
        assert title in page.text
    for phase in ("rollout", "score", "update"):
        assert phase in page.text
    assert "num_mini_batches: 2" in page.text
    assert page.text.count(NASTY) >= 3  # in a note, a prompt and a response, as text
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert f"{metrics[-1]['objective/response_length']:.3f}" in page.text


def test_samples_of_each_k_steps(run_dir):
    rows = read_lines(run_dir / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 1, 2, 2, 2, 4, 4, 4, 5, 5, 5, 6]
    for row in rows[:-1]:
        assert row["prompt"] in PROMPTS
        assert row["score"] == word_reward([row["prompt"]], [row["response"]])[0]


def test_a_samples_kl_is_the_policys_less_the_references():
    """Over its own tokens: what stands behind its end does not count."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ids = torch.zeros(2, 4, dtype=torch.long)
    rollout = Rollout(ids, ids, mask, ended=torch.tensor([True, False]))
    rollout.prompts, rollout.responses = ["p", "q"], ["a", "b"]
    scored = Score(
        logprobs=torch.tensor([[-1.0, -2.0, math.nan], [-1.0, -1.0, -1.0]]),
        ref_logprobs=torch.tensor([[-2.0, -2.5, 0.0], [-0.5, -1.0, -1.0]]),
        scores=torch.tensor([0.25, 0.5]),
    )
    first = {"prompt": "p", "response": "a", "score": 0.25, "kl": 1.5, "ended": True}
    second = {"prompt": "q", "response": "b", "score": 0.5, "kl": -0.5, "ended": False}
    assert some_samples(rollout, scored, 5) == [first, second]
    assert some_samples(rollout, scored, 1) == [first]


def test_samples_after_a_resume_are_written_once(tmp_path):
    for resume, steps in ((False, (1, 2, 3)), (True, (2, 3))):
        with Tracker(tmp_path, {}, resume=resume) as tracker:
            for step in steps:
                tracker.log_samples(step, [{"prompt": "p", "again": resume}], "ppo")
    rows = read_lines(tmp_path / "samples.jsonl")
    assert [(r["step"], r["again"]) for r in rows] == [(1, False), (2, True), (3, True)]


def test_report_of_a_run_that_was_cut_short(tmp_path):
    """No records, or half a line of them: still a page."""
    assert "no steps" in Page(report.write(tmp_path).read_text()).text
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ppo", "step": 1, "lr": 0.5}\n{"stage": "p')
    (tmp_path / "samples.jsonl").write_text("[1]\n")
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "config.yaml").write_bytes(b"\xff: [")
    page = Page(report.write(tmp_path).read_text())
    assert "1 ppo steps" in page.text and not page.wrong


def test_model_cards_have_front_matter_and_code_that_runs(run_dir, monkeypatch):
    for name in ("actor", "critic"):
        _, front, body = (run_dir / name / "README.md").read_text().split("---\n", 2)
        found = yaml.safe_load(front)
        assert found["base_model"] == "org/base" and found["library_name"] == "peft"
        code = body.split("```python\n")[1].split("```")[0]
        monkeypatch.setattr(
            "transformers.AutoModelForCausalLM.from_pretrained", lambda path: plain_model().base
        )
        names = {}
        exec(code.replace(f"path/to/{name}", str(run_dir / name)), names)
        assert isinstance(names["model"], peft.PeftModel)
        ids = torch.tensor([[5, 6, 7]])
        assert names["model"](ids).logits.isfinite().all()
