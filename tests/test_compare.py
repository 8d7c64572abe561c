"""The comparison counts what it says it counts, and its committed figures, picture and tables belong together."""

import json

import chain
import compare
import expected
import pytest
import tables
import torch
from examples import ROOT, SCRIPTS, SHORT, TOY

COMMITTED = json.loads((expected.EXPECTED / "compare.json").read_text())


def test_a_token_counts_up_to_and_with_the_first_end():
    completions = torch.tensor([[5, 9, 5, 9], [5, 5, 5, 5], [9, 0, 0, 0]])
    assert compare.until_end(completions, 9) == 2 + 4 + 1
    assert compare.until_end(completions, [0, 9]) == 2 + 4 + 1


@pytest.fixture
def counted(monkeypatch, tmp_path, small_world):
    """A function that runs a script for two steps, counted, beside the small world."""
    from transformers import GenerationMixin
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    monkeypatch.setattr(
        Qwen3Model, "forward", Qwen3Model.forward
    )  # so that what `watch` puts there is taken away again
    monkeypatch.setattr(GenerationMixin, "generate", GenerationMixin.generate)
    monkeypatch.chdir(tmp_path)
    load = compare.load

    def small(name):
        script = load(name)
        script.WORLD = small_world
        script.TOY["dataset_name"] = script.TOY["dataset_name"].replace(str(TOY), str(small_world))
        return script

    monkeypatch.setattr(compare, "load", small)
    monkeypatch.setattr("sys.argv", [])
    return lambda name: compare.run(name, *SHORT)


def test_sft_is_one_model_and_samples_nothing(counted):
    found = counted("sft")
    assert found["forward_passes"] == 2  # two steps
    assert 2 * 16 * 20 < found["forward_tokens"] <= 2 * 16 * 96
    assert found["generated_tokens"] == 0
    assert found["data"] == "prompt_completion"


def test_dpo_asks_the_reference_too(counted):
    assert counted("dpo")["forward_passes"] == 4


def test_grpo_passes_once_for_each_sampled_token_and_once_to_learn(counted):
    found = counted("grpo")
    assert 2 * 64 * 15 < found["generated_tokens"] < 2 * 64 * 48
    assert found["forward_passes"] > 2 * 30  # the longest answer of a batch has more than 30 tokens
    assert found["memory"] > 0
    assert 0 < found["kl"] < 5


def test_the_kl_is_that_of_rows_without_padding(small_world):
    """The teacher as the trained policy: answers, and their log-probabilities one row at a time."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    assert compare.kl_from_base(TOY / "policy", small_world) == pytest.approx(0, abs=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "teacher", padding_side="left")
    teacher, base = (
        AutoModelForCausalLM.from_pretrained(TOY / name, dtype=torch.float32).eval() for name in ("teacher", "policy")
    )
    prompts = load_dataset(str(small_world / "data" / "prompt_only"), split="test")["prompt"]
    batch = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    set_seed(compare.SEED)
    differences = []
    with torch.no_grad():
        whole = teacher.generate(**batch, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=64)
        start = batch["input_ids"].shape[1]
        for ids, mask in zip(whole, batch["attention_mask"], strict=True):
            prompt, answer = ids[:start][mask.bool()], ids[start:].tolist()
            answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
            row = torch.tensor([[*prompt.tolist(), *answer]])
            scores = [
                model(row)
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
                .gather(-1, torch.tensor(answer)[:, None])
                .sum()
                for model in (teacher, base)
            ]
            differences.append((scores[0] - scores[1]).item())
    found = compare.kl_from_base(TOY / "teacher", small_world)
    assert found == pytest.approx(sum(differences) / len(differences), abs=1e-3)
    assert found > 0.1


def test_every_script_is_compared_in_the_order_of_this_repository():
    assert list(COMMITTED["trainers"]) == [name for name in tables.TRAINERS if name in SCRIPTS]
    for name, found in COMMITTED["trainers"].items():
        own = json.loads((expected.EXPECTED / f"{name}.json").read_text())
        assert own["versions"] == COMMITTED["versions"]
        assert ("kl" in found) == (name in compare.POLICIES)


def test_what_samples_while_it_trains_has_generated_tokens_and_nothing_else_has():
    samples = {"ppo", "grpo", "rloo", "online_dpo", "nash_md", "xpo", "gkd"}
    found = {name for name, costs in COMMITTED["trainers"].items() if costs["generated_tokens"]}
    assert found == samples & set(SCRIPTS)


def test_the_picture_shows_these_figures():
    assert compare.digest() in (expected.EXPECTED / "compare.svg").read_text()


def test_part_of_a_comparison_is_not_put_beside_what_another_machine_gave(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "EXPECTED", tmp_path)
    (tmp_path / "compare.json").write_text(json.dumps(COMMITTED | {"machine": {"cpu": "another"}}))
    with pytest.raises(SystemExit, match="measure all"):
        compare.measure(["sft"])


def test_what_the_page_says_about_the_figures_is_so():
    """Two times in three before; demonstrations ahead of everything else; 512 problems; 48 and 960 demonstrations."""
    page = (ROOT / "annotated_examples" / "README.md").read_text()
    rows = {row["name"]: row for row in compare.rows() if row["name"] in compare.POLICIES}
    means = {name: sum(row["after"]) / len(row["after"]) for name, row in rows.items()}
    assert "right about two times in three" in page
    assert all(sum(row["before"]) / len(row["before"]) == pytest.approx(2 / 3, abs=0.02) for row in rows.values())
    assert "learning from demonstrations wins here" in page
    assert max(means, key=means.get) == "sft"
    problems = (TOY / "data" / "prompt_only" / "test.jsonl").read_text().splitlines()
    assert f"The same {len(problems)} held-out problems" in page
    sft = compare.load("sft").TOY
    [(_, few), *_] = chain.CHAINS["ppo"]
    assert f"after {int(few[few.index('--max_steps') + 1]) * sft['per_device_train_batch_size']} demonstrations" in page
    assert f"With the {sft['max_steps'] * sft['per_device_train_batch_size']} of" in page
