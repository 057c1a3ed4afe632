"""A model trained for seconds: the whole way from training to the regression's report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'sparse-mla[eval]'")
pytest.importorskip("lm_eval", reason="pip install 'sparse-mla[eval]'")

from tiny_glm5 import decode as decode_module
from tiny_glm5.config import SMALLEST, TINY
from tiny_glm5.data import Batches, Text, shard
from tiny_glm5.decode import Decoder
from tiny_glm5.export import export
from tiny_glm5.model import Attention, Run, TinyGlm5
from tiny_glm5.train import Plan, Trainer
from typer.testing import CliRunner

from sparse_mla.cli import app
from sparse_mla.evals import generate, lm, model, run, tasks
from sparse_mla.evals.problems import fewshot, held_out, prompt_of
from sparse_mla.evals.problems.vocabulary import encode, vocabulary
from sparse_mla.evals.regression import load_regression

CPU = torch.device("cpu")
TEXT = Text(length=256, batch=4, steps=4, templates=("age_future",))
PLAN = Plan(dense=4, warm_up=4, sparse=4, kl_rows=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("model")
    trainer = Trainer(SMALLEST, PLAN, TEXT, CPU, log=lambda line: None)
    trainer.run(Batches(TEXT, 0, 0, PLAN.steps, 0), every=4)
    export(trainer.model, folder)
    return trainer, folder


@pytest.fixture(scope="module")
def loaded(trained):
    return model.load(str(trained[1]), CPU)


def test_each_phase_trains_what_it_should():
    phases = {"dense": 0, "warm_up": 4, "sparse": 8}
    trainer = Trainer(SMALLEST, PLAN, TEXT, CPU, log=lambda line: None)
    for phase, step in phases.items():
        trainer.step = step
        before = {name: p.clone() for name, p in trainer.model.named_parameters()}
        tokens, marks = (part[0] for part in shard(TEXT, 1))
        loss, kl = trainer._train_step(tokens, marks, phase)
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
        indexer = {name for name in before if "indexer" in name}
        assert bool(moved & indexer) == (phase != "dense")
        assert bool(moved - indexer) == (phase != "warm_up")
        assert (float(kl) > 0) == (phase != "dense")
        assert (float(loss) > 0) == (phase != "warm_up")


def test_the_loss_falls_and_so_does_the_indexers(trained):
    rows = trained[0].rows
    assert [row["phase"] for row in rows] == ["dense", "warm_up", "sparse"]
    assert rows[2]["loss"] < rows[0]["loss"]


def test_training_resumes_where_it_stopped(trained, tmp_path):
    first = Trainer(SMALLEST, PLAN, TEXT, CPU, log=lambda line: None)
    first.run(Batches(TEXT, 0, 0, 6, 0))
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer(SMALLEST, PLAN, TEXT, CPU, log=lambda line: None)
    second.load(tmp_path / "checkpoint.pt")
    assert second.step == 6
    second.run(Batches(TEXT, 0, 6, PLAN.steps, 0))
    for name, weight in trained[0].model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight), name


def test_batches_drawn_by_other_processes_are_the_same():
    alone = list(Batches(TEXT, 3, 2, 9, 0))
    shared = Batches(TEXT, 3, 2, 9, 2)
    try:
        for (tokens, marks), (others, their_marks) in zip(alone, shared, strict=True):
            assert (tokens == others).all() and (marks == their_marks).all()
    finally:
        shared.close()
    assert len(alone) == 7


def test_the_published_shape_fits_its_file():
    with torch.device("meta"):
        count = sum(p.numel() for p in TinyGlm5(TINY).parameters())
    assert 5e6 <= count <= 12e6
    assert 2 * count <= 14.5e6
    assert (TINY.kv_lora_rank, TINY.qk_rope_head_dim, TINY.index_topk) == (512, 64, 128)


def test_the_tokenizer_file_is_the_vocabulary(loaded):
    tokenizer = loaded[1]
    odd = "Zebra's 12.5% <<3*4=12>>12 ~x\n\n\nend  "
    for text in (prompt_of(fewshot(), held_out(1)[0].question), odd):
        assert tokenizer(text).input_ids == encode(text)
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == len(vocabulary())


@pytest.fixture(scope="module")
def rounded(trained) -> TinyGlm5:
    """The weights as the file has them, in float32."""
    ours = TinyGlm5(SMALLEST)
    ours.load_state_dict(trained[0].model.state_dict())
    ours.round_weights()
    return ours.float()


def test_logits_are_those_of_transformers(trained, rounded, monkeypatch):
    """With transformers' selection given to ours; then what ours would select itself."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(trained[1], dtype=torch.float32)
    tokens = torch.tensor([encode(prompt_of(fewshot(3), "How many?"))])
    chosen = []
    for layer in theirs.model.layers:
        layer.self_attn.indexer.register_forward_hook(lambda *given: chosen.append(given[-1]))
    scored = []

    def select(attention, x, q_resid, cos, sin, visible):
        projected = attention.indexer.project(x, q_resid, cos, sin)
        scored.append(attention.indexer.scores(*projected, visible))
        return chosen[len(scored) - 1].long()

    monkeypatch.setattr(Attention, "select", select)
    with torch.no_grad():
        want = theirs(tokens).logits
        got = rounded.logits(tokens, Run(sparse=True))
        dense = rounded.logits(tokens)
    # fp32 sums in another order: 1e-6 of logits near 1.
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    beyond = slice(2 * SMALLEST.index_topk, None)
    assert float((dense - want)[0, beyond].abs().amax(-1).min()) > 1e-3
    for scores, indices in zip(scored, chosen, strict=True):
        # Of equal scores (relu makes many zeros) either may be taken.
        kept = scores.gather(-1, indices.long())[0, beyond]
        own = scores.topk(indices.shape[-1], -1).values[0, beyond]
        torch.testing.assert_close(kept.sort(-1).values, own.sort(-1).values, atol=1e-5, rtol=0)


def test_the_training_decoder_continues_as_a_whole_pass_does(rounded):
    rows = [encode(prompt_of(fewshot(1), problem.question)) for problem in held_out(2)]
    width, more = max(map(len, rows)), 3
    pad = torch.tensor([width - len(row) for row in rows])
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    decoder = Decoder(rounded, pad, width + more, sparse=False)
    with torch.no_grad():
        logits = decoder.forward(tokens, 0)
        for step in range(more):
            for row, ids in enumerate(rows):
                whole = rounded.logits(torch.tensor([ids]))[0, -1]
                torch.testing.assert_close(logits[row], whole, atol=2e-5, rtol=0)
            following = logits.argmax(-1)
            rows = [[*row, int(token)] for row, token in zip(rows, following, strict=True)]
            logits = decoder.forward(following[:, None], width + step)


def test_accuracy_counts_right_final_numbers(rounded, monkeypatch):
    asked = held_out(3)
    texts = [f"#### {asked[0].target}", "#### 0", ""]
    monkeypatch.setattr(decode_module, "answers", lambda *given, **settings: texts)
    share, wrong = decode_module.accuracy(rounded, asked, sparse=True)
    assert share == pytest.approx(1 / 3)
    assert [problem for problem, _ in wrong] == asked[1:]
    monkeypatch.undo()
    made = decode_module.answers(rounded, asked, fewshot(1), sparse=True, rows=2, longest=3)
    assert len(made) == 3


@pytest.mark.parametrize("layout", ["transformers", "bf16"])
def test_a_common_prefix_changes_nothing(loaded, layout):
    net, tokenizer = loaded
    prompts = [prompt_of(fewshot(1), problem.question) for problem in held_out(3)]
    model.attach(net, layout)
    try:
        together = generate.continue_prompts(net, tokenizer, prompts, until=["\n\n"], longest=2)
        alone = [
            generate.continue_prompts(net, tokenizer, [prompt], until=["\n\n"], longest=2)[0]
            for prompt in prompts
        ]
    finally:
        model.detach(net, layout)
    assert sum(a == b for a, b in zip(together, alone, strict=True)) >= 2


def test_answers_are_judged_by_lm_eval(loaded, monkeypatch):
    """With the model's part played: right, right with a comma's form, wrong, none."""
    problems = tasks.problem_set("problems", limit=4)
    played = [f" so\n#### {p.target}" for p in problems.asked]
    played[2], played[3] = " so\n#### 0", " nothing"
    seen = []

    def play(net, tokenizer, prompts, *, each, **settings):
        assert prompts[1] == prompt_of(problems.shots, problems.asked[1].question)
        assert settings["until"][0] == "\n\n"
        for number, text in enumerate(played):
            each(number, text)
        return played

    monkeypatch.setattr(lm, "continue_prompts", play)
    log = run.ask(*loaded, problems, on_answer=lambda *given: seen.append(given))
    assert [one.right for one in log.answered] == [True, True, False, False]
    assert [one.given for one in log.answered] == [
        *(p.target for p in problems.asked[:2]),
        "0",
        None,
    ]
    assert [right for _, _, right in seen] == [True, True, False, False]
    assert log.about["shots"] == 6 and log.share.right == 2


@pytest.fixture
def short(monkeypatch) -> None:
    """Few and short prompts and answers: the commands run as they are."""
    made = tasks.ProblemSet("problems", fewshot(1), held_out(2), 4)
    monkeypatch.setattr(tasks, "problem_set", lambda *given: made)


def test_eval_command_writes_a_log(trained, short, tmp_path):
    path = tmp_path / "log.jsonl"
    done = CliRunner().invoke(
        app, ["eval", "--model", str(trained[1]), "--log", str(path), "--show", "1"]
    )
    assert done.exit_code == 0, done.output
    assert "problems, v32_fp8: 0.000 (0 of 2" in done.output
    assert held_out(1)[0].question in done.output
    about = json.loads(path.read_text().splitlines()[0])
    assert about["layout"] == "v32_fp8" and about["task"] == "problems"


def test_the_regression_is_told_by_the_gate(trained, short, tmp_path):
    """Untrained or not: the operator tier names both faults and passes what is right."""
    results, html = tmp_path / "results.json", tmp_path / "report.html"
    done = CliRunner().invoke(
        app,
        ["eval", "regression", "--model", str(trained[1]), "--kl", "2", "--json", str(results),
         "--html", str(html)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = {one.variant.key: one for one in load_regression(results).measured}
    assert {key: one.operator.diagnosis for key, one in found.items()} == {
        "bf16": "", "fp8": "", "fault_1": "scale_pow2_down", "fault_2": "scale_bf16",
        "repaired": "",
    }  # fmt: skip
    assert found["fault_1"].first == found["fault_2"].first == "operator"
    assert not found["bf16"].seen and not found["fp8"].seen
    assert found["fault_1"].operator.gain < -0.1
    text = html.read_text()
    assert "fault 1" in text and text.count("data:image/svg+xml") == 2
    again = CliRunner().invoke(app, ["eval", "report", str(results), str(tmp_path / "b.html")])
    assert again.exit_code == 0 and (tmp_path / "b.html").stat().st_size > 10_000


def test_documents_say_what_committed_results_say():
    import evaluation_tables

    for document, text in evaluation_tables.documents(evaluation_tables.ROOT).items():
        assert document.read_text() == text, f"{document.name}: run tools/evaluation_tables.py"


def test_a_prompt_past_the_models_positions_is_refused(loaded):
    net, tokenizer = loaded
    problems = tasks.ProblemSet("problems", fewshot(40), held_out(1), 128)
    with pytest.raises(ValueError, match="max_position_embeddings 2048"):
        run.ask(net, tokenizer, problems)


def test_a_foreign_file_has_no_report(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"format": "other"}')
    done = CliRunner().invoke(app, ["eval", "report", str(path), str(tmp_path / "b.html")])
    assert done.exit_code == 2 and "format is 'other'" in done.output


def broken(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "corrupt":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "pickled":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif kind == "none":
        weights.unlink()
    elif kind == "missing":
        from safetensors.torch import load_file, save_file

        kept = {k: v for k, v in load_file(weights).items() if "layers.1.self_attn" not in k}
        save_file(kept, weights, {"format": "pt"})
    elif kind == "rank":
        config = json.loads((folder / "config.json").read_text())
        config["kv_lora_rank"] = 256
        (folder / "config.json").write_text(json.dumps(config))
    elif kind == "architecture":
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = "no_such_model"
        (folder / "config.json").write_text(json.dumps(config))
    elif kind == "config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("corrupt", "cannot be loaded"),
        ("pickled", "is a pickle"),
        ("none", "has no safetensors"),
        ("missing", "lacks"),
        ("rank", "kv_a_layernorm.weight is [512], must be [256]"),
        ("architecture", "cannot be loaded"),
        ("config", "has no config.json"),
    ],
)
def test_broken_models_are_refused_in_one_line(trained, tmp_path, kind, problem):
    folder = tmp_path / "model"
    shutil.copytree(trained[1], folder)
    broken(folder, kind)
    done = CliRunner().invoke(app, ["eval", "--model", str(folder), "--limit", "1"])
    assert done.exit_code == 2
    assert problem in done.output
    assert "Traceback" not in done.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line_after_the_results(trained):
    arguments = ["eval", "--model", str(trained[1]), "--limit", "1", "--log", "/dev/full"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stderr.endswith("error: /dev/full: No space left on device\n")
    assert "problems" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--model is missing"),
        (["--model", "./nowhere"], "must be a folder"),
        (["--model", "{}", "--fault", "no_such"], "fault is 'no_such'"),
        (["--model", "{}", "--layout", "no_such"], "'no_such', allowed: v32_fp8, bf16\n"),
        (["--model", "{}", "--layout", "bf16_nope"], "layout is 'bf16_nope'"),
        (["--model", "{}", "--task", "no_such"], "task is 'no_such'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(trained, arguments, problem):
    arguments = [argument.format(trained[1]) for argument in arguments]
    done = CliRunner().invoke(app, ["eval", "--limit", "1", *arguments])
    assert done.exit_code == 2
    assert problem in done.output and len(done.output.strip().splitlines()) == 1
