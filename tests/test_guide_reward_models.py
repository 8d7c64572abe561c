"""The formulas of reference_guides/reward_models.md against TRL's own trainers and against enumeration; its runs and figures.

What Reward, PRM and PPO compute is compared with real methods of real trainers on random tensors, value and gradient, to
1e-5 (relative, float32), partly by the tests of their walkthroughs, called here with the functions of the guide. The committed
measurement is held by what it must agree with, and its tool by short runs in this process.
"""

import inspect
import itertools
import json
import math
import re
import statistics
from types import SimpleNamespace

import compare
import expected
import pytest
import reward_hacking
import test_walkthrough_prm as prm
import torch
import transformers
from datasets import Dataset
from markdown_pages import GUIDES, ROOT, fences, formulas, inline_math, symbols
from test_walkthrough_prm import make, random_loss  # noqa: F401  (fixtures)
from transformers import PrinterCallback, Qwen3Config, Qwen3ForSequenceClassification, Qwen3ForTokenClassification
from trl import GRPOTrainer, RewardConfig, RewardTrainer, RLOOTrainer
from trl.experimental import nash_md, online_dpo, ppo, xpo
from trl.experimental.utils import get_reward
from walkthrough_tools import CHECKPOINTING, PAIRS, checked_formulas, config, noting, page_of, tokenizer

PAGE = GUIDES / "reward_models.md"
WALKTHROUGHS = [ROOT / "annotated_trainers" / f"{name}.md" for name in ("reward", "prm", "ppo")]
TOY = ROOT / "annotated_examples" / "toy"
MEASURED = json.loads(reward_hacking.RESULT.read_text())
SEEDS = (0, 1, 2)
PAD = 0
ERRORS: list[float] = []


page = page_of(PAGE)


@pytest.fixture(scope="module", autouse=True)
def summary():
    before = len(prm.ERRORS)
    yield
    errors = ERRORS + prm.ERRORS[before:]
    print(f"\n{len(CHECKED)} formulas, {len(errors)} comparisons with TRL, largest error {max(errors, default=0):.1e}")


CALLED, CHECKED, checks = checked_formulas()
functions = noting(CALLED)


def agree(ours, theirs) -> None:
    ours, theirs = (torch.as_tensor(value).detach().double() for value in (ours, theirs))
    assert ours.shape == theirs.shape
    ERRORS.append(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)))
    assert ERRORS[-1] < 1e-5


def text() -> str:
    return " ".join(PAGE.read_text("utf-8").split())


# ------------------------------------------------------------------------------------------------- the score, against TRL


def built(folder, own=None) -> RewardTrainer:
    torch.manual_seed(0)
    args = RewardConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **{CHECKPOINTING: False})
    model = Qwen3ForSequenceClassification(Qwen3Config(**config(num_labels=1)))
    trainer = RewardTrainer(
        model, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=own or tokenizer()
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    made = built(tmp_path_factory.mktemp("reward"))
    made.model.eval()
    return made


def slopes(scores, model, seed):
    """Gradients of a random combination of scores in the head and in the embeddings."""
    weights = [model.score.weight, model.get_input_embeddings().weight]
    upstream = torch.randn(len(scores), generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(scores, weights, upstream)


@checks("last-token-score")
def test_the_score_equals_that_of_the_reward_trainer(functions, trainer):
    pad = trainer.model.config.pad_token_id
    for seed in SEEDS:
        dice = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, len(tokenizer()), (6, 9), generator=dice)  # the pad token stands anywhere
        ids[:2, 6:], ids[2:4, :4], ids[4, :3], ids[4, 7:] = pad, pad, pad, pad
        batch = {"input_ids": ids, "attention_mask": (ids != pad).long()}
        theirs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)[1].logits[:, 0]
        hidden = trainer.model.model(**batch).last_hidden_state
        ours = functions["last_token_score"](hidden, ids, trainer.model.score.weight, pad)
        agree(ours, theirs)
        for mine, true in zip(slopes(ours, trainer.model, seed), slopes(theirs, trainer.model, seed), strict=True):
            agree(mine, true)


@checks("first-pad-score", "last-token-score")
def test_the_score_that_ppo_reads_equals_get_reward(functions, trainer):
    model, context = trainer.model, 4
    for seed in SEEDS:
        dice = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, len(tokenizer()), (6, 11), generator=dice)
        ids[0, :2], ids[1, 9:], ids[2, 4:], ids[3, 6], ids[4, :3], ids[4, 5:] = PAD, PAD, PAD, PAD, PAD, PAD
        theirs = get_reward(model, ids, PAD, context)[1]
        seen = ids != PAD
        hidden = model.model(
            input_ids=ids.masked_fill(~seen, 0), attention_mask=seen, position_ids=seen.cumsum(1) - seen.long()
        ).last_hidden_state
        ours = functions["first_pad_score"](hidden, ids, model.score.weight, PAD, context)
        agree(ours, theirs)
        for mine, true in zip(slopes(ours, model, seed), slopes(theirs, model, seed), strict=True):
            agree(mine, true)
        # the two rules agree where pad tokens stand at the end only; row 3 has one inside its answer
        same = functions["last_token_score"](hidden, ids, model.score.weight, PAD) == ours
        assert same.tolist() == [True, True, True, False, True, True]


@checks("pair-accuracy")
def test_pair_accuracy_equals_the_metric_of_the_reward_trainer(functions, trainer):
    for seed, margin in itertools.product(SEEDS, (None, 5.0)):
        dice = torch.Generator().manual_seed(seed)
        chosen, rejected = torch.randn(2, 7, generator=dice)
        rejected[0] = chosen[0]  # a tie
        inputs = {"attention_mask": torch.ones(14, 3)} | (
            {} if margin is None else {"margin": torch.full((7,), margin)}
        )
        logits = torch.cat([chosen, rejected])[:, None]
        trainer._metrics["eval"].clear()
        trainer.compute_loss(lambda logits=logits, **_: SimpleNamespace(logits=logits), inputs)
        agree(functions["pair_accuracy"](chosen, rejected), trainer._metrics["eval"]["accuracy"][-1])
    assert functions["pair_accuracy"](torch.zeros(3), torch.zeros(3)) == 0


def test_reward_trainer_takes_eos_for_a_missing_pad_token_and_tells_the_model(tmp_path):
    assert built(tmp_path, tokenizer(pad=None)).model.config.pad_token_id == tokenizer().eos_token_id


def test_grpo_sends_a_cut_answer_with_the_end_token_that_it_never_wrote(page, monkeypatch):
    seen, own = {}, page["tokenizer"]

    class Spy(torch.nn.Module):
        def forward(self, **inputs):
            seen.update(inputs)
            return SimpleNamespace(logits=torch.zeros(len(inputs["input_ids"]), 1))

    monkeypatch.setattr(transformers.Trainer, "_prepare_inputs", lambda self, inputs: inputs)
    grpo = GRPOTrainer.__new__(GRPOTrainer)
    grpo.__dict__.update(
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, is_main_process=True),
        reward_funcs=[Spy()],
        reward_func_names=["reward"],
        reward_processing_classes=[own],
        chat_template_kwargs={},
        environments=None,
        state=SimpleNamespace(global_step=0),
        args=SimpleNamespace(report_to=[]),
    )
    question, cut = [{"role": "user", "content": "7+9+3"}], "7+9=16 16+3=1"
    grpo._calculate_rewards([{"prompt": question}], [question], [[{"role": "assistant", "content": cut}]], [[1]])
    assert own.decode(seen["input_ids"][0]) == f"<|user|>7+9+3<|end|><|assistant|>{cut}<|end|>"


def test_who_hands_over_ids_and_who_renders_the_conversation():
    for kind in (GRPOTrainer, RLOOTrainer, online_dpo.OnlineDPOTrainer):
        assert "apply_chat_template(x, reward_processing_class" in " ".join(inspect.getsource(kind).split())
    for kind in (ppo.PPOTrainer, nash_md.NashMDTrainer, xpo.XPOTrainer):
        assert " get_reward(" in inspect.getsource(kind)


def test_what_the_page_says_of_the_pad_token_is_what_its_block_prints(page):
    usual = page["first_score"]()
    assert usual == page["first_score"]("left") and "<|end|>" in usual and "padding" not in usual
    eos = page["EOS"]
    assert page["first_score"](padding=eos, told=eos) == page["first_score"](end="")
    assert page["first_score"](padding=eos, told=eos).endswith("'9'")
    assert page["first_score"](padding=eos).endswith("padding")
    assert "Cannot handle batch sizes > 1" in page["first_score"](told=None)
    assert page["first_score"](told=None, row=0).endswith("padding")  # row by row it reads padding
    assert page["model"].config.pad_token_id == PAD


# ------------------------------------------------------------------------------------------------------------ calibration


@checks("calibration-error")
def test_the_calibration_error_equals_a_loop_over_bins(functions):
    for seed, bins in itertools.product(SEEDS, (1, 5, 10)):
        dice = torch.Generator().manual_seed(seed)
        chosen, rejected = (2 * torch.randn(2, 60, generator=dice)).double()
        found = {}
        for w, other in zip(chosen.tolist(), rejected.tolist(), strict=True):
            sure = 1 / (1 + math.exp(-abs(w - other)))
            found.setdefault(min(math.floor((sure - 0.5) * 2 * bins), bins - 1), []).append((sure, w > other))
        means = [(len(one), *(statistics.fmean(x) for x in zip(*one, strict=True))) for one in found.values()]
        true = sum(n / 60 * abs(right - sure) for n, sure, right in means)
        assert float(functions["calibration_error"](chosen, rejected, bins)) == pytest.approx(true)


def test_pairs_drawn_by_the_model_itself_are_calibrated(page):
    dice = torch.Generator().manual_seed(0)
    margin = 2 * torch.randn(20_000, generator=dice).abs()
    drawn = torch.where(torch.rand(20_000, generator=dice) < margin.sigmoid(), margin, -margin)
    assert page["calibration_error"](drawn, torch.zeros(20_000)) < 0.02


# ---------------------------------------------------------------------------------------------------------- process rewards


@pytest.fixture(autouse=True)
def fewer_cases(monkeypatch):
    monkeypatch.setattr(prm, "CASES", prm.CASES[1::4])


@checks("step-label-loss")
def test_the_loss_equals_that_of_prm_trainer(functions, random_loss):  # noqa: F811
    prm.test_the_loss_on_the_page_is_what_trl_computes(functions, random_loss)


@checks("step-probability")
def test_the_probability_equals_that_of_prm_trainer(functions, random_loss, monkeypatch):  # noqa: F811
    for seed in SEEDS:
        prm.test_the_probability_on_the_page_is_what_trl_has(functions, random_loss, monkeypatch, seed)


@checks("step-accuracy")
def test_the_accuracy_equals_that_of_prm_trainer(functions):
    prm.test_the_accuracy_on_the_page_is_what_trl_computes(functions)


@checks("first-error-accuracy")
def test_the_first_error_is_that_of_the_script(functions):
    first_error = compare.load("prm").first_error
    for seed in SEEDS:
        dice = torch.Generator().manual_seed(seed)
        logits, labels = torch.randn(20, 9, 2, generator=dice), torch.randint(0, 2, (20, 9), generator=dice)
        logits[..., 1] += 1
        labels[torch.rand(20, 9, generator=dice) < 0.5] = -100
        labels[0] = -100
        right = [
            first_error(row[told != -100].argmax(-1)) == first_error(told[told != -100])
            for row, told in zip(logits, labels, strict=True)
        ]
        assert functions["first_error_accuracy"](logits, labels) == sum(right) / 20
        assert 0 < sum(right) < 20


def test_labels_of_tokens_are_those_that_the_page_prints(page):
    """What the block prints, held against the sentences below it."""
    row, plain = page["example"], page["plain"]

    def labels(**more):
        return [one for one in page["PRMTrainer"].tokenize_row(row, **plain | more)["labels"] if one != -100]

    assert labels() == [1, 0, 0]
    assert labels(train_on_last_step_only=True) == [0]
    assert labels(train_on_last_step_only=True, is_eval=True) == [1, 0, 0]
    cut = page["PRMTrainer"].tokenize_row(row, **plain | {"max_completion_length": 12})
    assert [one for one in cut["labels"] if one != -100] == [1]
    assert page["tokenizer"].decode(cut["input_ids"]).endswith("7+9=16 16+3=")


@checks("rank-by-product", "rank-by-minimum", "rank-by-last")
def test_the_product_is_the_probability_that_all_steps_are_right_and_the_others_look_at_one_step(functions):
    for seed in SEEDS:
        q = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        outcomes = torch.tensor(list(itertools.product([0, 1], repeat=5)))
        chances = torch.where(outcomes == 1, q, 1 - q).prod(1)
        assert float(functions["rank_by_product"](q)) == pytest.approx(float(chances[outcomes.all(1)].sum()))
        assert float(chances.sum()) == pytest.approx(1)
        assert functions["rank_by_minimum"](q) == sorted(q.tolist())[0]
        assert functions["rank_by_last"](q) == q.tolist()[4]


# --------------------------------------------------------------------------------------------------------------- best of N


def random_policy(seed, count=5):
    dice = torch.Generator().manual_seed(seed)
    probs = torch.rand(count, generator=dice, dtype=torch.double)
    return probs / probs.sum(), torch.randn(count, generator=dice, dtype=torch.double)


@checks("best-of-n-policy", "best-of-n-kl")
def test_best_of_n_equals_a_sum_over_all_samples_and_its_kl_is_below_the_formula(functions):
    for seed, n in itertools.product(SEEDS, (1, 2, 4)):
        probs, scores = random_policy(seed)
        exact = torch.zeros_like(probs)
        for drawn in map(list, itertools.product(range(5), repeat=n)):
            exact[max(drawn, key=lambda i: scores[i])] += probs[drawn].prod()
        found = functions["best_of_n_policy"](probs, scores, n)
        torch.testing.assert_close(found, exact)
        kl = float((found * (found / probs).log()).sum())
        assert kl <= functions["best_of_n_kl"](n) + 1e-12
    # and it is the limit of many equally likely answers
    count = 100_000
    even, scores = torch.full((count,), 1 / count, dtype=torch.double), torch.arange(count, dtype=torch.double)
    for n in (2, 16):
        below = scores / count  # what best_of_n_policy would find with a table of all pairs
        found = (below + even) ** n - below**n
        kl = float(torch.special.xlogy(found, found / even).sum())
        assert kl == pytest.approx(functions["best_of_n_kl"](n), abs=1e-3)


@checks("best-of-n-mean")
def test_the_mean_over_groups_equals_a_loop_over_all_of_them(functions):
    for seed, n in itertools.product(SEEDS, (1, 2, 5, 7)):
        dice = torch.Generator().manual_seed(seed)
        scores, values = (torch.randn(7, generator=dice).tolist() for _ in range(2))
        groups = list(itertools.combinations(range(7), n))
        true = statistics.fmean(values[max(group, key=lambda i: scores[i])] for group in groups)
        assert functions["best_of_n_mean"](scores, values, n) == pytest.approx(true)
        assert reward_hacking.best_of(scores, values, n) == pytest.approx(true)


def test_the_tool_shares_ties():
    scores, values = [1.0, 2.0, 2.0, 0.0], [0.0, 1.0, 0.5, 1.0]
    for n in (1, 2, 3, 4):
        means = []
        for group in itertools.combinations(range(4), n):
            top = max(scores[i] for i in group)
            means.append(statistics.fmean(values[i] for i in group if scores[i] == top))
        assert reward_hacking.best_of(scores, values, n) == pytest.approx(statistics.fmean(means))


def test_the_truth_rises_and_falls_as_the_block_prints(page):
    rights = [float(page["best_of_n_policy"](page["probs"], page["scored"], n)[0]) for n in (1, 2, 4, 16, 256, 1024)]
    assert rights[0] < rights[1] < rights[2] and rights[2] > rights[3] > rights[4] > rights[5]
    assert rights[1] == pytest.approx(0.995**2 - 0.295**2)
    assert "$0.295^2 = 0.087$" in text() and "$1 - 0.995^2 = 0.010$" in text() and "right with 0.903" in text()
    assert abs(0.295**2 - 0.087) < 5e-4 and rights[1] == pytest.approx(0.903, abs=5e-4)
    assert page["best_of_n_kl"](64) == pytest.approx(3.2, abs=0.05) and "by 3.2 nats" in text()


# ------------------------------------------------------------------------------------------------- the tool, in short runs


def test_a_short_run_of_the_tool(tmp_path):
    found = reward_hacking.run("rule", 1, every=1, problems=4, max_steps=1)
    assert [look["step"] for look in found["looks"]] == [0, 1] and len(found["trained"]) == 1
    before, after = found["looks"]
    assert before["kl"] == pytest.approx(0, abs=1e-4) and after["kl"] != before["kl"]
    assert before["ended"] == 1 and before["reward"] == pytest.approx(1 - before["tokens"] / 10)


def test_a_look_has_the_kl_and_the_truth_of_rows_read_one_by_one():
    own, base, problems = (
        reward_hacking.tokenizer(),
        reward_hacking.policy(),
        reward_hacking.rows("prompt_only", "test"),
    )
    teacher = transformers.AutoModelForCausalLM.from_pretrained(TOY / "teacher", dtype=torch.float32).eval()
    answers, _ = reward_hacking.draw_answers(teacher, own, problems[:6], seed=3)
    assert all(one[-1] == own.eos_token_id and one.count(own.eos_token_id) == 1 for one in answers)
    found = reward_hacking.look(teacher, base, own, problems[:6], lambda prompts, texts, ids: [1.0] * 6, seed=3)
    differences, right = [], []
    for row, answer in zip(problems, answers, strict=False):
        prompt = own.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            both = [
                model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)[range(len(answer)), answer].sum().item()
                for model in (teacher, base)
            ]
        differences.append(both[0] - both[1])
        right.append(own.decode(answer).removesuffix("<|end|>").endswith(f"#{row['answer']}"))
    assert found["kl"] == pytest.approx(statistics.fmean(differences), abs=2e-3)
    assert found["right"] == pytest.approx(statistics.fmean(right), abs=1e-4)
    assert found["tokens"] == pytest.approx(statistics.fmean(map(len, answers)), abs=0.01)


def test_the_rewards_of_the_rule():
    chats = [[{"role": "assistant", "content": text}] for text in ("3+4=7 #7", "#", "#12 ", "no")]
    assert reward_hacking.has_a_result(chats) == [1, 0, 1, 0]
    assert reward_hacking.few_tokens([[1] * 10, [1]]) == [-1.0, -0.1]


def test_scores_of_the_tool_do_not_depend_on_the_batch():
    model = reward_hacking.classifier(TOY / "reward_model")
    pairs = reward_hacking.rows("preference", "test")[:3]
    chats = [pair["prompt"] + pair["chosen"] for pair in pairs]
    alone = [reward_hacking.score(model, [chat])[0] for chat in chats]
    assert reward_hacking.score(model, chats) == pytest.approx(alone, abs=1e-3)
    assert min(reward_hacking.margins(model, pairs)) > 0


def test_the_process_scores_of_the_tool_are_those_of_steps_read_one_by_one(tmp_path):
    torch.manual_seed(0)
    kind = Qwen3ForTokenClassification
    model = kind.from_pretrained(TOY / "policy", num_labels=2, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    problems = reward_hacking.rows("prompt_only", "test")[:2]
    texts = ["3+4=7 7+0=7 #7", "#4"]
    found = reward_hacking.process_scores(tmp_path, problems, texts)
    own = reward_hacking.tokenizer()
    for row, text_, judged in zip(problems, texts, found, strict=True):
        ids = own.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        true = []
        for step in text_.split(" "):
            ids = ids + own(step + " ", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                true.append(float(model(torch.tensor([ids])).logits[0, -1].softmax(-1)[1]))
        assert judged == pytest.approx(true, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- what it measured


def test_the_measurement_is_whole():
    assert list(MEASURED["runs"]) == list(reward_hacking.RUNS)
    assert MEASURED["command"] == "python tools/reward_hacking.py"
    assert set(MEASURED["versions"]) == set(reward_hacking.PACKAGES) and MEASURED["machine"]["threads"] == 1
    first = {}
    for name, (_, changed, seeds) in reward_hacking.RUNS.items():
        assert [one["seed"] for one in MEASURED["runs"][name]] == list(seeds)
        for one in MEASURED["runs"][name]:
            steps = changed["max_steps"]
            assert [look["step"] for look in one["looks"]] == list(range(0, steps + 1, reward_hacking.EVERY))
            assert len(one["trained"]) == steps
            start = one["looks"][0]
            # the same policy answers the same problems with the same dice
            seen = start["right"], start["tokens"], *start["samples"]
            assert first.setdefault(one["seed"], seen) == seen and abs(start["kl"]) < 1e-3
    assert reward_hacking.digest() in reward_hacking.PICTURE.read_text()


def test_best_of_one_is_the_mean_and_the_truth_is_the_best_judge():
    best = MEASURED["best"]
    for one in best["judges"].values():
        assert one["right"][0] == pytest.approx(best["reachable"][0], abs=1e-3)
        assert all(mine <= most + 1e-3 for mine, most in zip(one["right"], best["reachable"], strict=True))
        assert one["score"] == sorted(one["score"])  # the score itself never falls
    assert best["problems"] == reward_hacking.PROBLEMS and best["answers"] == reward_hacking.ANSWERS


def at(name, key, place=-1) -> list[float]:
    """A figure of each seed of a run at its last look, or at another one."""
    return [one["looks"][place][key] for one in MEASURED["runs"][name]]


def test_what_the_page_says_of_the_shipped_reward_model():
    first, second, third = MEASURED["runs"]["shipped"]
    rewards, truths = ([look[key] for look in first["looks"]] for key in ("reward", "right"))
    assert rewards == sorted(rewards) and truths.index(max(truths)) == 1 and truths[-1] < 0.05
    assert "The truth rises with it for ten steps and then falls to almost nothing" in text()
    ends = [one["looks"][-1] for one in (third, second)]
    assert f"With seed 3 it falls to {ends[0]['right']:.2f}, with seed 2 not at all" in text()
    assert f"two are {ends[0]['reward']:.1f} and {ends[1]['reward']:.1f}: the worse policy has the higher one" in text()
    truths = [[look["right"] for look in one["looks"]] for one in (third, second)]
    assert truths[0].index(max(truths[0])) == 1 and truths[1] == sorted(truths[1])
    far = [one["looks"][-1]["kl"] for one in (third, first, second)]
    assert f"are {far[0]:.0f} and {far[1]:.0f} nats from the base at the end, the good one {far[2]:.1f}" in text()


def test_the_hacked_answers_add_up_and_are_not_what_was_asked():
    problems = reward_hacking.rows("prompt_only", "test")
    for row, answer in zip(problems, MEASURED["runs"]["shipped"][0]["looks"][-1]["samples"], strict=False):
        *steps, result = answer.split(" ")
        for step in steps:
            left, right = step.split("=")
            assert sum(map(int, left.split("+"))) == int(right)
        assert result == f"#{right}" and result != f"#{row['answer']}"


def test_what_the_page_says_of_the_penalty():
    low = min(at("shipped-kl", "right"))
    assert f"end with at least {math.floor(100 * low) / 100:.2f} of the answers right" in text()
    assert max(at("shipped-kl", "kl")) < 1 and len(at("shipped-kl", "kl")) == 3
    assert all(held < free for held, free in zip(at("shipped-kl", "reward"), at("shipped", "reward"), strict=True))
    assert reward_hacking.RUNS["shipped-kl"][1]["beta"] == 0.3 and "the same run with `beta=0.3`" in text()


def test_what_the_page_says_of_the_other_runs():
    assert reward_hacking.RUNS["fast"][1]["learning_rate"] / compare.load("grpo").TOY["learning_rate"] > 3
    for first, second, end in zip(at("fast", "right", 0), at("fast", "right", 2), at("fast", "right"), strict=True):
        assert first > 0.6 and second < 0.05 and end < 0.05
    assert all(end < start - 5 for start, end in zip(at("fast", "reward", 0), at("fast", "reward"), strict=True))
    for name in set(reward_hacking.RUNS) - {"fast"}:
        assert all(end > start for start, end in zip(at(name, "reward", 0), at(name, "reward"), strict=True))
    assert max(at("few", "right") + at("rule", "right")) < 0.2
    for one in MEASURED["runs"]["few"]:
        truths = [look["right"] for look in one["looks"]]
        assert truths[1] < truths[0] and abs(one["looks"][-1]["tokens"] - one["looks"][0]["tokens"]) < 2
    assert max(at("rule", "right", 1)) < 0.05 and sorted(at("rule", "tokens"))[1] < 10 < max(at("rule", "tokens"))
    formed = [r + tokens / 10 for r, tokens in zip(at("rule", "reward", 0), at("rule", "tokens", 0), strict=True)]
    assert min(formed) > 0.99  # "Nearly all answers keep the form from the start"


def test_with_the_exact_checker_the_same_settings_end_where_the_page_says():
    grpo = json.loads((expected.EXPECTED / "grpo.json").read_text())["held_out"]["right answers"]["after"]
    assert f"[{min(grpo):.2f} to {max(grpo):.2f}]" in text()


def test_what_the_page_says_of_the_best_of_n():
    best = MEASURED["best"]
    rights = {name: dict(zip(reward_hacking.SIZES, one["right"], strict=True)) for name, one in best["judges"].items()}
    shipped, few = rights["shipped"], rights["few"]
    assert all(one[2] > one[1] and one[64] < max(one.values()) for one in rights.values())
    assert (
        f"from {shipped[1]:.2f} to {shipped[8]:.2f} with eight answers" in text()
        and max(shipped.values()) == shipped[8]
    )
    assert f"and back to {shipped[64]:.2f} with 64" in text()
    assert 1 - shipped[64] == pytest.approx(1 / 8) and best["reachable"][-1] == 1
    assert few[2] > few[1] and all(few[n] < few[1] for n in (4, 8, 16, 32, 64))
    for n in reward_hacking.SIZES[1:]:
        product, minimum, end = (rights[f"process, {name}"][n] for name in ("product", "minimum", "last"))
        assert product > minimum > end
    assert best["prm_steps"] == 150 and compare.load("prm").TOY["max_steps"] == 400
    found = round(200 * best["process"]["first error found"])
    assert f"in {found} of the 200 held-out answers" in text()


def test_what_the_page_says_of_the_two_reward_models(page):
    few = page["few"]
    accuracy = {name: float((margin > 0).float().mean()) for name, margin in few.items()}
    sure = {name: float(margin.abs().sigmoid().mean()) for name, margin in few.items()}
    assert accuracy["train"] > 0.85 and 0.5 < accuracy["test"] < 0.6 and sure["test"] > accuracy["test"] + 0.1
    assert (page["chosen"] > page["rejected"]).all()
    assert len(few["train"]) == reward_hacking.PAIRS == 64 and len(few["test"]) == 200


# ---------------------------------------------------------------------------------------------------- nothing is left out


def table(first_header) -> list[dict]:
    """The rows of the table of the page whose first header is this."""
    lines = PAGE.read_text("utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first_header} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in rows]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_every_formula_has_a_test():
    assert {found.name for found in formulas(PAGE)} == set(CHECKED)


def test_formulas_are_written_as_in_the_walkthroughs():
    ours = {found.name: found.latex.split() for found in formulas(PAGE)}
    shared = set()
    for path in WALKTHROUGHS:
        found = re.findall(
            r"<!-- formula: ([a-z0-9-]+) -->\n(?:<!--.*?-->\n)?```math\n(.*?)```", path.read_text("utf-8"), re.S
        )
        for name, latex in found:
            if name in ours:
                shared.add(name)
                assert ours[name] == latex.split(), f"{name} differs from {path.name}"
    assert shared == {"last-token-score", "step-probability", "step-label-loss", "step-accuracy"}


def math_symbols(cell):
    return {symbol for latex in cell.split("$")[1::2] for symbol in symbols(latex)}


def test_every_symbol_is_in_the_notation_or_in_the_table_of_this_page():
    own = table("symbol")
    notation = re.findall(r"^\| (\$.*?) \|", (GUIDES / "notation.md").read_text("utf-8"), re.M)
    known = {symbol for cell in [*notation, *(row["symbol"] for row in own)] for symbol in math_symbols(cell)}
    lines, used = PAGE.read_text("utf-8").splitlines(), set()
    for line, latex in inline_math(PAGE):
        if not lines[line - 1].startswith("| $"):
            used |= symbols(latex)
    used |= {symbol for found in formulas(PAGE) for symbol in symbols(found.latex)}
    assert used <= known, sorted(used - known)
    code = "".join(fence.text for fence in fences(PAGE) if fence.lang == "python")
    for row in own:
        assert math_symbols(row["symbol"]) <= used, (row["symbol"], math_symbols(row["symbol"]) - used)
        for name in re.findall(r"`([^`]+)`", row["name in the code"]):
            assert re.search(r"\b" + re.escape(name), code), f"no block uses the name {name!r}"


def test_the_settings_of_the_runs_are_those_of_the_script():
    grpo = compare.load("grpo").TOY
    rates = {
        name: changed.get("learning_rate", grpo["learning_rate"])
        for name, (_, changed, _) in reward_hacking.RUNS.items()
    }
    assert {name for name, rate in rates.items() if rate == grpo["learning_rate"]} == set(rates) - {"fast"}
    assert set(expected.PACKAGES) >= set(reward_hacking.PACKAGES)
