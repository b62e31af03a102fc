"""The chat judge against a server on this machine: verdicts, both orders, failures, cache."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hydra_rlhf import judge
from hydra_rlhf.cli import main
from hydra_rlhf.data.bundled import build_tokenizer
from hydra_rlhf.errors import UserError
from hydra_rlhf.judge import ChatJudge


class Server(ThreadingHTTPServer):
    """Answers by ``reply(a, b)``; ``trouble`` holds what to send instead of the first answers."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.trouble, self.requests, self.headers = reply, [], [], []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, body))
            self.server.headers.append(dict(self.headers))
            trouble = self.server.trouble.pop(0) if self.server.trouble else None
        if trouble is not None:
            return self.send(*trouble)
        question = body["messages"][1]["content"]
        a, b = question.split("[Answer A]\n")[1].split("\n\n[End")[0].split("\n\n[Answer B]\n")
        reply = {
            "choices": [{"message": {"role": "assistant", "content": self.server.reply(a, b)}}]
        }
        reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
        self.send(200, json.dumps(reply).encode())

    def send(self, status, content, headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    servers = []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in judge.KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def serve(reply):
        servers.append(Server(reply))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def longer(a, b):
    verdict = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return f"A says a, B says b.\n\nVerdict: {verdict}"


PROMPTS = ["p", "q", "r", "s"]
OURS = ["long answer", "short", "same", "equal"]
THEIRS = ["short", "long answer", "same", "eqqal"]


def test_verdicts_in_both_orders(serve):
    server = serve(longer)
    judge = ChatJudge(server.url, "m", prices=(2.0, 10.0))
    assert judge.compare(PROMPTS, OURS, THEIRS) == [1.0, 0.0, 0.5, 0.5]
    # The third pair's answers are the same: not asked.
    assert len(server.requests) == 6
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    assert {(b["model"], b["temperature"]) for _, b in server.requests} == {("m", 0)}
    usage = judge.usage
    assert (usage.asked, usage.cached, usage.failures, usage.order_dependent) == (6, 0, 0, 0)
    assert (usage.prompt_tokens, usage.completion_tokens) == (600, 60)
    assert usage.cost == pytest.approx((600 * 2 + 60 * 10) / 1e6)
    assert "6 questions (0 from the cache)" in judge.summary()
    assert "cost 0.0018" in judge.summary()


def test_a_judge_that_favours_a_place_gives_ties(serve):
    judge = ChatJudge(serve(lambda a, b: "Verdict: A").url, "m")
    assert judge.compare(PROMPTS, OURS, THEIRS) == [0.5] * 4
    assert judge.usage.order_dependent == 3


def test_a_win_in_one_order_is_a_tie(serve):
    server = serve(lambda a, b: "Verdict: A" if a == "long answer" else "Verdict: tie")
    assert ChatJudge(server.url, "m").compare(["p"], ["long answer"], ["short"]) == [0.5]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Verdict: A", 1.0),
        ("**Verdict: b**", 0.0),
        ("verdict - [[TIE]]", 0.5),
        ("Verdict: A would be rash.\nVerdict: B", 0.0),  # the last one counts
        ("Verdict: Apple", None),
        ("A is better.", None),
        ("", None),
    ],
)
def test_replies_are_read(serve, reply, expected):
    judge = ChatJudge(serve(lambda a, b: reply).url, "m")
    assert judge._verdict("p", "x", "y") == expected
    assert judge.usage.unclear == (expected is None)


def test_one_verdict_counts_where_the_other_is_unclear(serve):
    judge = ChatJudge(serve(lambda a, b: "Verdict: A" if a == "x" else "?").url, "m")
    assert judge.compare(["p"], ["x"], ["y"]) == [1.0]
    assert judge.compare(["p"], ["y"], ["x"]) == [0.0]
    assert judge.compare(["p"], ["y"], ["z"]) == [0.5]


def test_retries_with_back_off(serve, monkeypatch):
    server = serve(longer)
    server.trouble = [
        (429, b"", [("Retry-After", "3")]),
        (500, b"oops", [("Retry-After", "1")]),  # sooner than we would
        (200, b"no json"),
        (200, b'{"choices": []}'),
    ]
    judge = ChatJudge(server.url, "m", backoff=2.0, workers=1, attempts=5)
    waits = []
    monkeypatch.setattr(judge._given_up, "wait", waits.append)
    assert judge.compare(["p"], ["long answer"], ["short"]) == [1.0]
    assert waits == [3.0, 4.0, 8.0, 16.0]
    assert (judge.usage.retries, judge.usage.failures) == (4, 0)


def test_waits_have_a_limit(serve, monkeypatch):
    server = serve(longer)
    server.trouble = [(503, b"", [("Retry-After", "86400")]), (503, b"", [("Retry-After", "soon")])]
    judge = ChatJudge(server.url, "m", workers=1)
    waits = []
    monkeypatch.setattr(judge._given_up, "wait", waits.append)
    judge.compare(["p"], ["long answer"], ["short"])
    assert waits == [60.0, 2.0]


def test_failures_are_counted_and_too_many_are_an_error(serve):
    server = serve(longer)
    server.trouble = [(500, b"")] * 2
    judge = ChatJudge(server.url, "m", attempts=2, backoff=0.0, workers=1, max_failures=0.5)
    assert judge.compare(["p"], ["long answer"], ["short"]) == [1.0]  # by the second order alone
    assert (judge.usage.failures, judge.usage.retries) == (1, 1)
    server.trouble = [(500, b"")] * 2
    strict = ChatJudge(server.url, "m", attempts=2, backoff=0.0, workers=1)
    with pytest.raises(UserError, match="1 of 2 questions failed after 2 attempts each"):
        strict.compare(["p"], ["long answer"], ["short"])


def test_failures_are_those_of_one_call(serve):
    """A tenth of the questions before it cannot excuse, nor condemn, what fails in this one."""
    server = serve(longer)
    judge = ChatJudge(server.url, "m", attempts=1, workers=1, max_failures=0.4)
    server.trouble = [(500, b"")]
    assert len(judge.compare(PROMPTS, OURS, THEIRS)) == 4  # 1 of 6
    assert judge.compare(["p"], ["long answer"], ["short"]) == [1.0]  # none of 2
    server.trouble = [(500, b"")]
    with pytest.raises(UserError, match="1 of 2 questions failed"):
        judge.compare(["p"], ["long answer"], ["short"])


def test_after_a_refusal_the_next_call_asks_again(serve):
    server = serve(longer)
    judge = ChatJudge(server.url, "m", workers=1)
    server.trouble = [(401, b"?")]
    with pytest.raises(UserError, match="HTTP 401"):
        judge.compare(["p"], ["long answer"], ["short"])
    assert judge.compare(["p"], ["long answer"], ["short"]) == [1.0]


def test_a_cached_reply_is_of_one_model(serve, tmp_path):
    server = serve(longer)
    for model in ("m", "n", "m"):
        judge = ChatJudge(server.url, model, cache=tmp_path / "cache.jsonl")
        judge.compare(["p"], ["long answer"], ["short"])
    assert [body["model"] for _, body in server.requests] == ["m", "m", "n", "n"]
    assert judge.usage.cached == 2
    other = serve(longer)  # of the same name at another address
    ChatJudge(other.url, "m", cache=tmp_path / "cache.jsonl").compare(["p"], ["long"], ["x"])
    judge = ChatJudge(server.url, "m", cache=tmp_path / "cache.jsonl")
    judge.compare(["p"], ["long"], ["x"])
    assert len(other.requests) == 2 and judge.usage.cached == 0


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ((401, b'{"error": {"message": "Incorrect\\nAPI key"}}'), "HTTP 401: Incorrect API key"),
        ((404, b'{"message": "no model m"}'), "HTTP 404: no model m"),
        ((400, b"?"), "HTTP 400: Bad Request"),
        ((307, b"", [("Location", "http://elsewhere.example/")]), "redirects to http://elsewhere"),
        ((302, b"", [("Location", "http://elsewhere.example/")]), "redirects to http://elsewhere"),
    ],
)
def test_refusals_are_not_repeated(serve, trouble, message):
    server = serve(longer)
    server.trouble = [trouble] * 100
    with pytest.raises(UserError, match=message):
        ChatJudge(server.url, "m", workers=1).compare(PROMPTS * 10, OURS * 10, THEIRS * 10)
    assert len(server.requests) == 1


def test_an_endpoint_that_is_not_there(serve):
    server = serve(longer)
    server.shutdown()
    server.server_close()
    judge = ChatJudge(server.url, "m", attempts=2, backoff=0.0)
    with pytest.raises(UserError, match="6 of 6 questions failed"):
        judge.compare(PROMPTS, OURS, THEIRS)


def test_the_cache_lets_a_run_resume(serve, tmp_path):
    server, cache = serve(longer), tmp_path / "folder" / "judge.jsonl"
    first = ChatJudge(server.url, "m", cache=cache)
    assert first.compare(PROMPTS[:1], OURS[:1], THEIRS[:1]) == [1.0]
    assert len(server.requests) == 2
    # Cut off in the middle of a line, as by a crash.
    cache.write_bytes(cache.read_bytes()[:-5])
    second = ChatJudge(server.url, "m", cache=cache)
    assert second.compare(PROMPTS, OURS, THEIRS) == [1.0, 0.0, 0.5, 0.5]
    assert (second.usage.asked, second.usage.cached) == (6, 1)
    assert len(server.requests) == 2 + 5
    third = ChatJudge(server.url, "m", cache=cache)
    assert third.compare(PROMPTS, OURS, THEIRS) == [1.0, 0.0, 0.5, 0.5]
    assert third.usage.cached == 6 and third.usage.prompt_tokens == 0
    other_model = ChatJudge(server.url, "n", cache=cache)
    other_model.compare(PROMPTS, OURS, THEIRS)
    assert other_model.usage.cached == 0
    with pytest.raises(UserError, match="judge cache"):
        ChatJudge(server.url, "m", cache=tmp_path)


def test_what_was_answered_before_a_failure_is_kept(serve, tmp_path):
    server = serve(longer)
    cache = tmp_path / "judge.jsonl"
    broken = ChatJudge(server.url, "m", cache=cache, attempts=1, workers=1, max_failures=0.2)
    broken.compare(["p"], ["long answer"], ["short"])
    server.trouble = [(500, b"")] * 2
    with pytest.raises(UserError, match="2 of 6 questions failed.*is in the cache"):
        broken.compare(PROMPTS[1:] + ["t"], OURS[1:] + ["u"], THEIRS[1:] + ["vv"])
    assert len(cache.read_text().splitlines()) == 2 + 4


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(serve, tmp_path, monkeypatch):
    server = serve(longer)
    ChatJudge(server.url, "m").compare(["p"], ["x"], ["yy"])
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one")
    ChatJudge(server.url, "m").compare(["p"], ["x"], ["yy"])
    assert server.headers[-1]["Authorization"] == "Bearer sk-one"
    monkeypatch.setenv("HYDRA_JUDGE_API_KEY", "sk-two")
    judge = ChatJudge(server.url, "m", cache=tmp_path / "c.jsonl")
    judge.compare(["p"], ["x"], ["yy"])
    assert server.headers[-1]["Authorization"] == "Bearer sk-two"
    assert "sk-two" not in (tmp_path / "c.jsonl").read_text() + judge.summary()
    server.trouble = [(403, b"{}")]
    with pytest.raises(UserError) as error:
        ChatJudge(server.url, "m").compare(["p"], ["x"], ["yy"])
    assert "sk-two" not in str(error.value)


def test_urls(serve):
    server = serve(longer)
    for url in (server.url, server.url + "/", server.url + "/chat/completions"):
        assert ChatJudge(url, "m").url == server.url + "/chat/completions"
    for url in ("localhost:8000", "file:///etc/passwd", "http://", ""):
        with pytest.raises(UserError, match="expected http"):
            ChatJudge(url, "m")


def test_options_of_the_request(serve):
    server = serve(longer)
    options = {"max_tokens": None, "temperature": 1, "max_completion_tokens": 9}
    ChatJudge(server.url, "m", options=options).compare(["p"], ["x"], ["yy"])
    body = server.requests[0][1]
    assert "max_tokens" not in body
    assert (body["temperature"], body["max_completion_tokens"]) == (1, 9)


def test_on_pair_reports_progress(serve):
    done = []
    ChatJudge(serve(longer).url, "m").compare(PROMPTS, OURS, THEIRS, on_pair=done.append)
    assert done == [1, 2, 3, 4]


def tiny_model(path, seed):
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(["The rain."], 260)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=1.0,  # sure of itself, so that two seeds say different things
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_evaluate_by_an_endpoint(serve, tmp_path, capsys):
    server = serve(lambda a, b: f"Verdict: {'A' if a > b else 'B'}")
    policies = [f"{name}={tiny_model(tmp_path / name, seed)}" for seed, name in enumerate("ab")]
    prompts, cache = tmp_path / "prompts.jsonl", tmp_path / "cache.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Rain {i}?"}) + "\n" for i in range(6)))
    command = ["evaluate", "--policies", *policies, "--prompts", str(prompts), "--device", "cpu"]
    command += ["--response-length", "8", "--judge-url", server.url, "--judge-model", "m"]
    command += ["--judge-cache", str(cache), "--judge-prices", "1", "2"]
    reports = []
    for folder in ("first", "again"):
        assert main([*command, "--output", str(tmp_path / folder)]) == 0
        reports.append(json.loads((tmp_path / folder / "evaluation.json").read_text()))
        out = " ".join(capsys.readouterr().out.split())
        assert "judge m: 12 questions" in out
    assert reports[0]["judge"] == "m" and reports[0]["win_rates"] == reports[1]["win_rates"]
    a, b = (answers["responses"] for answers in reports[0]["answers"])
    expected = sum(x.strip() > y.strip() for x, y in zip(a, b, strict=True)) / 6
    assert reports[0]["win_rates"][0][1][0] == pytest.approx(expected)
    assert len(server.requests) == 12  # the second run asked nothing


def test_evaluate_wants_both_url_and_model(capsys):
    assert main(["evaluate", "--policies", "x", "--judge-url", "http://h"]) == 2
    assert "judge_url and judge_model go together" in capsys.readouterr().err
    command = ["evaluate", "--policies", "x", "--judge-prices", "1"]
    assert main(command) == 2
    assert "judge_prices must be two numbers, got 1" in capsys.readouterr().err
