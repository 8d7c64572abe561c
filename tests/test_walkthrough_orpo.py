"""The claims of annotated_trainers/orpo.md that running TRL can show, on a random model of two layers, on the CPU."""

import ast
import difflib
import functools
import inspect
import json
import math
import os
import re
import textwrap
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import pytest
import torch
from datasets import Dataset
from markdown_pages import fences
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer, orpo_trainer
from trl.experimental.orpo.orpo_trainer import log1mexp
from trl.trainer.base_config import _BaseConfig
from trl.trainer.utils import selective_log_softmax
from walkthrough_tools import (
    CHECKPOINTING,
    EXAMPLES,
    EXPECTED,
    LOPSIDED,
    PAGES,
    arguments_of,
    batch_of,
    comparisons,
    config,
    counts,
    defaults_on,
    experts,
    formula_names,
    make_trainer,
    measured,
    metrics_on,
    model_folder,
    named_tests,
    page_of,
    prose,
    random_pairs,
    repeated,
    save,
    section_of,
    t5,
    text,
    tokenizer,
    trained,
    words,
)
from walkthrough_tools import PAIRS as ROWS

PAGE = PAGES / "orpo.md"
section = functools.partial(section_of, PAGE)
MEASURED = EXPECTED / "orpo.json"
checkpoint = model_folder()


@pytest.fixture(scope="module")
def make(checkpoint, tmp_path_factory):
    """Makes an ORPOTrainer; keyword arguments of ORPOTrainer go there, all others to ORPOConfig."""

    def make(rows=ROWS, model=None, **more) -> ORPOTrainer:
        model = model if model or "model_init" in more else checkpoint
        sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 2}
        more = {**sizes, "remove_unused_columns": False, **more}
        return make_trainer(ORPOTrainer, ORPOConfig, tmp_path_factory.mktemp("run"), rows, model=model, **more)

    return make


@pytest.fixture
def trainer(make):
    """A trainer for the tests that look at one; what they set on it, they set for themselves."""
    return make(eval_dataset=Dataset.from_list(ROWS))


def told(*sentences: str) -> bool:
    """Whether the page says all of this, wherever its lines break."""
    page = prose(PAGE)
    return all(sentence in page for sentence in sentences)


# ---------------------------------------------------------------------------- the formulas, against TRL's own methods


page = page_of(PAGE)
ERRORS, agree, summary = comparisons()


VOCABULARY = 13


@pytest.fixture
def random_loss(trainer):
    """TRL's own loss and metrics on random logits, the gradient in the logits, and what went into it."""

    def run(seed, pairs=3, beta=0.1, scale=2.0):
        dice = torch.Generator().manual_seed(seed)

        batch = trainer.data_collator(random_pairs(dice, pairs, VOCABULARY))
        stacked = trainer.concatenated_inputs(batch)
        ids, labels, mask = (stacked[f"concatenated_{name}"] for name in ("input_ids", "labels", "attention_mask"))
        logits = (scale * torch.randn((*ids.shape, VOCABULARY), generator=dice)).requires_grad_()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "beta", beta)
            loss, metrics = trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)
        (gradient,) = torch.autograd.grad(loss, logits)

        logps = torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        answer = labels[:, 1:] != -100
        prompt = (mask[:, 1:] == 1) & ~answer
        means = (logps * answer).sum(1) / answer.sum(1)
        return SimpleNamespace(
            loss=loss.detach(),
            metrics=metrics,
            gradient=gradient,
            logits=logits,
            token_logps=logps,
            answer=answer,
            prompt=prompt,
            tokens=answer.sum(1),
            chosen=means[:pairs],
            rejected=means[pairs:],
            # what the supervised term is made of: the chosen rows, sums and numbers of tokens
            sft=[
                *((logps * part).sum(1)[:pairs] for part in (prompt, answer)),
                *(part.sum(1)[:pairs] for part in (prompt, answer)),
            ],
        )

    return run


CASES = [(seed, pairs) for seed in range(6) for pairs in (1, 4)]


def same(ours, found):
    """A value of the page and its gradient in the logits, against those of TRL."""
    agree(ours, found.loss.double())
    (gradient,) = torch.autograd.grad(ours, found.logits)
    agree(gradient, found.gradient)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, 10.0])
def test_the_key_equation_is_what_trl_computes(page, random_loss, beta):
    for seed, pairs in CASES:
        found = random_loss(seed, pairs, beta)
        same(page["orpo_loss"](found.chosen, found.rejected, page["orpo_nll"](*found.sft), beta), found)


def test_the_supervised_term_on_the_page_is_what_trl_computes(page, random_loss):
    for seed, pairs in CASES:
        found = random_loss(seed, pairs, beta=0.0)
        nll = page["orpo_nll"](*found.sft)
        agree(nll, torch.tensor(found.metrics["nll_loss"], dtype=torch.double))
        same(nll, found)


def test_the_odds_on_the_page_are_what_trl_computes(page, random_loss):
    for seed, pairs in CASES:
        found = random_loss(seed, pairs)
        odds = page["log_odds"](found.chosen) - page["log_odds"](found.rejected)
        agree(odds.mean().exp(), torch.tensor(found.metrics["log_odds_chosen"], dtype=torch.double).exp())
    means = -torch.logspace(-5, 1, 50)
    for value in means:  # from a token probability of 0.99999 to one of 0.00005
        ours, theirs = (value.clone().requires_grad_() for _ in range(2))
        page["log_odds"](ours).backward()
        (theirs - log1mexp(theirs)).backward()
        agree(ours.grad, theirs.grad)
        assert math.exp(page["log_odds"](value.double())) == pytest.approx(1 / (math.exp(-float(value)) - 1), rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_the_pull_on_the_page_is_what_trl_has(page, random_loss, beta):
    for seed, pairs in CASES:
        found = random_loss(seed, pairs, beta)
        tokens, sft_tokens = found.tokens, sum(found.sft[2:]).sum()
        pulls = page["orpo_pull"](found.chosen, found.rejected, tokens[:pairs], tokens[pairs:], sft_tokens, beta)
        prompt, chosen, rejected = (torch.as_tensor(pull).detach() for pull in pulls)
        each = torch.cat([chosen, rejected])[:, None] * found.answer  # the same for all tokens of an answer
        each[:pairs] += prompt * found.prompt[:pairs]
        (gradient,) = torch.autograd.grad(-(each * found.token_logps).sum(), found.logits)
        agree(gradient, found.gradient)


def test_every_displayed_formula_has_its_function_and_is_compared_above():
    assert formula_names(PAGE) == ["log-odds", "orpo-loss", "orpo-nll", "orpo-pull"]


# -------------------------------------------------------------------------------------------------- the code of CPO


def code(trainer_class: type, name: str) -> list[str]:
    """The lines of a method without comments and docstring, the names of the classes made equal."""
    function = ast.parse(textwrap.dedent(inspect.getsource(getattr(trainer_class, name)))).body[0]
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return ast.unparse(function).replace("ORPO", "CPO").split("\n")


def difference(name: str) -> tuple[list[str], list[str]]:
    """The lines of a method that only CPO has, and those that only ORPO has."""
    lines = [line for line in difflib.ndiff(code(CPOTrainer, name), code(ORPOTrainer, name)) if line[0] in "-+"]
    return [line[2:].strip() for line in lines if line[0] == "-"], [
        line[2:].strip() for line in lines if line[0] == "+"
    ]


SAME = ("build_tokenized_answer", "concatenated_inputs", "store_metrics", "log", "evaluation_loop")
SAME += ("generate_from_model", "_shift_right", "_save_checkpoint")
OTHERS = {  # so many lines are in CPO only, and in ORPO only
    **{"__init__": (18, 4), "tokenize_row": (0, 9), "get_batch_logps": (1, 1), "concatenated_forward": (10, 16)},
    **{"get_batch_loss_metrics": (11, 17), "compute_loss": (0, 1), "prediction_step": (0, 2)},
}


def test_eight_methods_are_those_of_cpo_word_for_word():
    assert len(SAME) == 8
    for name in SAME:
        assert difference(name) == ([], []), name
    assert told("Eight of its sixteen methods are word for word the same")


def test_the_other_methods_differ_from_cpo_in_these_lines_only():
    own = {name for name, value in vars(ORPOTrainer).items() if inspect.isroutine(value)}
    assert own == {*SAME, *OTHERS, "odds_ratio_loss"}
    assert {name: tuple(map(len, difference(name))) for name in OTHERS} == OTHERS
    removed, added = difference("get_batch_logps")
    assert (removed, added) == (["labels[labels == -100] = 0"], ["labels = torch.where(labels == -100, 0, labels)"])
    assert difference("compute_loss") == ([], ["loss = loss.to(self.args.device)"])
    assert difference("prediction_step")[1][0] == "if not self.use_dpo_data_collator:"
    assert difference("tokenize_row")[1][0] == "if is_torch_xla_available():"
    removed, added = difference("__init__")
    assert "processing_class.pad_token = processing_class.eos_token" in removed
    assert [line for line in added if "padding_value" in line] == [
        "self.padding_value = args.padding_value if args.padding_value is not None else processing_class.pad_token_id"
    ]


def test_the_config_has_no_code_of_its_own():
    assert "__post_init__" not in vars(ORPOConfig)
    assert told("`ORPOConfig` has no code of its own, only defaults")


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(make, tmp_path):
    model = save(experts(output_router_logits=True), tmp_path)
    trainer = make(model=model, eval_dataset=Dataset.from_list(ROWS), eval_strategy="epoch")
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert set(metrics_on(PAGE)) == logged
    assert trainer.aux_loss_enabled


@pytest.mark.parametrize("on", [True, False])
def test_the_auxiliary_loss_is_added_and_not_logged(make, tmp_path, on):
    trainer = make(model=save(experts(output_router_logits=on, router_aux_loss_coef=0.5), tmp_path))
    batch = batch_of(trainer, range(2))
    loss, metrics = measured(trainer, batch)
    with torch.no_grad():
        outputs = trainer.concatenated_forward(trainer.model, batch)
    two_terms = float(outputs[4] - trainer.odds_ratio_loss(*outputs[:2])[0].mean())
    assert loss == pytest.approx(two_terms + (0.5 * float(outputs[5]) if on else 0), rel=1e-5)
    assert len(outputs) == 5 + on
    assert not [key for key in metrics if "aux" in key]


def test_the_two_logged_odds_are_not_what_they_are_called(random_loss):
    found = random_loss(2, pairs=4)
    chosen, rejected = (means.exp() / (1 - means.exp()) for means in (found.chosen.detach(), found.rejected.detach()))
    ratio = (chosen / rejected).log()
    assert found.metrics["log_odds_chosen"] == pytest.approx(float(ratio.mean()), rel=1e-5)
    assert found.metrics["log_odds_chosen"] != pytest.approx(float(chosen.log().mean()), rel=0.1)
    assert found.metrics["log_odds_ratio"] == pytest.approx(float(ratio.sigmoid().log().mean()), rel=1e-5)
    assert found.metrics["log_odds_ratio"] < 0


def test_rewards_are_beta_times_the_mean_and_have_no_odds_in_them(random_loss):
    found = random_loss(2, pairs=4, beta=0.3)
    for kind in ("chosen", "rejected"):
        mean = float(getattr(found, kind).detach().mean())
        assert found.metrics[f"logps/{kind}"] == pytest.approx(mean, rel=1e-5)
        assert found.metrics[f"rewards/{kind}"] == pytest.approx(0.3 * mean, rel=1e-5)
    margin = found.metrics["rewards/chosen"] - found.metrics["rewards/rejected"]
    assert found.metrics["rewards/margins"] == pytest.approx(margin, rel=1e-4)
    right = float((found.chosen > found.rejected).double().mean())
    assert 0 < right < 1
    assert found.metrics["rewards/accuracies"] == pytest.approx(right)


def test_a_pair_of_equal_answers_counts_as_wrong_and_costs_beta_log_2(make):
    trainer = make([text("1+2", "3", "3")] * 2)
    loss, metrics = measured(trainer, batch_of(trainer, range(2)))
    assert metrics["rewards/accuracies"] == 0
    assert loss - metrics["nll_loss"] == pytest.approx(0.1 * math.log(2), abs=1e-6)
    assert told("$\\beta \\log 2$, which is 0.0693 with the default")
    assert f"{0.1 * math.log(2):.4f}" == "0.0693"


def test_the_first_loss_of_the_toy_run_is_mostly_about_prompts():
    held_out = json.loads(MEASURED.read_text("utf-8"))["held_out"]
    loss, nll = held_out["loss"]["before"][0], held_out["nll_loss"]["before"][0]
    assert told(f"the first loss is {loss:.3f}, of which {nll:.3f} is the supervised term")
    first = re.findall(r"nll [\d.]+, of which prompts ([\d.]+) and answers ([\d.]+)", PAGE.read_text("utf-8"))[0]
    assert float(first[0]) > 100 * float(first[1])


def test_the_rejected_answers_of_the_toy_run_stay_likely():
    log = json.loads(MEASURED.read_text("utf-8"))["log"]["logps/rejected"]
    assert log["step"][-1] == 60
    assert -0.35 < log["min"][-1] < log["max"][-1] < -0.25
    assert told("after 60 steps their tokens still have a mean log-probability of about -0.3")


def test_total_flos_is_always_0(make):
    trainer = make()
    trainer.train()
    assert trainer.state.log_history[-1]["total_flos"] == 0


def test_metrics_since_the_last_training_line_are_never_shown(make):
    trainer = make(max_steps=3, logging_steps=2)
    assert len(trained(trainer)) == 1
    assert "log_odds_ratio" not in trainer.state.log_history[-1]
    assert len(trainer._stored_metrics["train"]["log_odds_ratio"]) == 1


def test_the_mean_logits_leave_out_the_last_position_only(random_loss):
    found = random_loss(1, pairs=3)
    assert found.metrics["logits/chosen"] == pytest.approx(float(found.logits[:3, :-1].mean().detach()), rel=1e-4)
    assert found.metrics["logits/chosen"] != pytest.approx(float(found.logits[:3].mean().detach()), rel=1e-3)
    assert not (found.answer | found.prompt)[:3].all()  # there is padding among them


def test_eleven_numbers_are_fetched_for_every_micro_batch(trainer):
    assert len(measured(trainer, batch_of(trainer, range(2)))[1]) == 11
    assert told("Eleven numbers are fetched from the device")


# ------------------------------------------------------------------------------------------------------- the two terms


def test_one_forward_pass_of_one_model_makes_a_step(make):
    trainer, shapes = make(max_steps=1), []
    trainer.model.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape[0]))
    trainer.train()
    assert shapes == [4]  # two pairs
    assert not [name for name in vars(trainer) if "ref" in name]


def test_one_model_in_training_has_sixteen_bytes_a_parameter(make):
    trainer = make(max_steps=1)
    trainer.train()
    weights = list(trainer.model.parameters())
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*weights, *weights, *moments))  # a gradient each
    assert held == 16 * sum(weight.numel() for weight in weights)


def test_the_sft_term_covers_prompt_and_chosen_answer(make):
    trainer = make([text("1+2", "3", "4"), text("7+1+1", "9", "8 or 9")])
    batch = batch_of(trainer, range(2))
    _, metrics = measured(trainer, batch)
    ids, mask = batch["chosen_input_ids"], batch["chosen_attention_mask"]
    with torch.no_grad():
        logits = trainer.model(ids, attention_mask=mask).logits[:, :-1]
    logps = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    counted = mask[:, 1:] == 1
    assert counted.sum().item() == (3 + 1 + 1 - 1) + (5 + 1 + 1 - 1)  # prompt, answer, end, without the first token
    assert metrics["nll_loss"] == pytest.approx(-float(logps[counted].mean()), rel=1e-5)
    answers = batch["chosen_labels"][:, 1:] != -100
    assert metrics["nll_loss"] != pytest.approx(-float(logps[answers].mean()), rel=1e-3)


def test_no_setting_of_the_config_reaches_the_sft_term(random_loss):
    own = set(ORPOConfig.__dataclass_fields__) - set(_BaseConfig.__dataclass_fields__)
    others = {"max_length", "max_completion_length", "disable_dropout", "padding_value", "generate_during_eval"}
    others |= {"is_encoder_decoder", "model_init_kwargs", "trust_remote_code", "dataset_num_proc"}
    assert own == {"beta", *others}
    one, two = random_loss(3, beta=0.0), random_loss(3, beta=7.0)
    assert float(one.loss) == pytest.approx(one.metrics["nll_loss"])
    assert one.metrics["nll_loss"] == two.metrics["nll_loss"]


def test_twice_beta_is_twice_the_second_term(random_loss):
    none, one, two = (random_loss(4, beta=beta) for beta in (0.0, 0.3, 0.6))
    assert float(two.loss - none.loss) == pytest.approx(2 * float(one.loss - none.loss), rel=1e-4)
    assert torch.allclose(two.gradient - none.gradient, 2 * (one.gradient - none.gradient), atol=1e-7)
    assert (one.gradient - none.gradient).abs().max() > 1e-3


def test_the_sentences_under_the_table_of_pulls_are_those_of_the_table(page):
    pulls = page["pulls"]
    short, _, long = [(supervised / (chosen - supervised)).item() for supervised, chosen, _ in pulls]
    assert short == pytest.approx(8, abs=0.5)
    assert long == pytest.approx(1 / 3, abs=0.05)
    assert told("is eight times that of the second term", "Behind one of 1000 tokens it is a third of it")


def slopes(p_chosen: float, p_rejected: float) -> tuple[float, float]:
    """The pulls of TRL's second term on the mean log-probabilities of one pair, with a beta of 1: up and down."""
    this = SimpleNamespace(beta=1.0, accelerator=SimpleNamespace(device=torch.device("cpu")))
    pair = [torch.tensor([p]).double().log().float().requires_grad_() for p in (p_chosen, p_rejected)]
    (ORPOTrainer.odds_ratio_loss(this, *pair)[0]).sum().backward()
    return pair[0].grad.item(), -pair[1].grad.item()


def test_the_pull_downwards_fades_and_the_pull_upwards_stays(page):
    for p_chosen, p_rejected in ((0.5, 0.5), (0.9, 0.5), (0.99, 0.5), (0.99, 0.8), (0.5, 0.9), (0.5, 0.99)):
        ours, theirs = page["both_pulls"](p_chosen, p_rejected), slopes(p_chosen, p_rejected)
        assert theirs == pytest.approx(ours, rel=1e-4)
        assert theirs[0] / theirs[1] == pytest.approx((1 - p_rejected) / (1 - p_chosen), rel=1e-4)
    for p_rejected in (0.2, 0.5, 0.8):
        up, down = slopes(0.99999, p_rejected)
        assert up == pytest.approx(p_rejected / (1 - p_rejected), rel=1e-2)  # the odds of the rejected answer
        assert down < 1e-3


def test_the_denominator_amplifies_where_the_likelihood_is_high():
    assert slopes(0.5, 0.99)[1] > 50 * slopes(0.5, 0.5)[1]
    assert told("denominators amplify the gradient where a likelihood is *low*. Its own equation 10 says the opposite")


def test_one_rejected_answer_that_is_nearly_certain_outweighs_a_batch(trainer):
    chosen = torch.full((8,), 0.5).log().requires_grad_()
    rejected = torch.tensor([0.5] * 7 + [0.9999]).log().requires_grad_()
    (-trainer.odds_ratio_loss(chosen, rejected)[0].mean()).backward()
    assert rejected.grad[7] > 100 * (rejected.grad[:7].sum() + chosen.grad.abs().sum())


def test_accumulation_changes_the_sft_term_and_not_the_odds(make):
    rows = [text("1", "1", "2"), text("3", "3 and a much longer answer to it", "4")]
    (one,) = trained(make(rows, max_steps=1, per_device_train_batch_size=2))
    (two,) = trained(make(rows, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2))
    for key in ("log_odds_ratio", "log_odds_chosen", "rewards/margins"):
        assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-6)
    for key in ("nll_loss", "loss", "grad_norm"):
        assert one[key] != pytest.approx(two[key], rel=1e-3)
    norms = []
    for settings in (
        {"per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    ):
        (line,) = trained(make(rows, max_steps=1, beta=1e6, **settings))  # the first term is lost beside the second
        norms.append(line["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_the_parent_divides_by_the_accumulation_whatever_the_trainer_promises(make):
    found = []
    for promise in (False, True):
        trainer = make(max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2)
        trainer.model_accepts_loss_kwargs = promise
        found += trained(trainer)
    assert found[0] == found[1]


def test_the_length_of_an_answer_does_not_count_in_the_odds(trainer, random_loss):
    found = random_loss(5, pairs=4)
    assert len(set(found.tokens.tolist())) > 2
    assert found.metrics["logps/chosen"] == pytest.approx(float(found.chosen.mean().detach()), rel=1e-5)
    logits = torch.zeros(2, 9, VOCABULARY)  # all tokens alike, seven of them and two
    labels = torch.tensor([[-100] * 2 + [5] * 7, [-100] * 2 + [5] * 2 + [-100] * 5])
    short, long = trainer.get_batch_logps(logits, labels, average_log_prob=True)
    assert float(short) == pytest.approx(float(long))


# ------------------------------------------------------------------------------------------------------- near certainty


def test_log1mexp_is_right_and_its_slope_is_nan_near_0(page):
    edge = 2.0**-25
    for value in (-1e-3, -1e-6, -1.1 * edge, -0.9 * edge, -1e-12):
        x = torch.tensor(value, requires_grad=True)
        log1mexp(x).backward()
        assert float(log1mexp(x).detach()) == pytest.approx(math.log(-math.expm1(float(x))), rel=1e-6)
        assert math.isnan(x.grad) == (value > -edge)
        ours = torch.tensor(value, requires_grad=True)
        page["log_odds"](ours).backward()
        assert math.isfinite(ours.grad)
    assert float(log1mexp(torch.tensor(0.0))) == -math.inf
    assert told("Nearer to 0 than $2^{-25}$, about 3e-8")
    assert f"{edge:.0e}" == "3e-08"


def test_a_token_has_log_probability_0_where_the_page_says_so():
    for rest, zero in ((9e-7, True), (1.1e-6, False)):
        logits = torch.tensor([[[20.0, 20.0 + math.log(rest)]]])
        assert (float(selective_log_softmax(logits, torch.tensor([[0]]))) == 0) == zero


def make_sure(trainer, answer: str):
    """Adds 60 to the logit of every token of one of the two answers: what a model that is sure of it would say."""
    half = slice(0, 2) if answer == "chosen" else slice(2, 4)

    def raised(_, args, outputs):
        bonus = torch.zeros_like(outputs.logits)
        bonus[half, 2:-1] = 60.0 * torch.nn.functional.one_hot(args[0][half, 3:], outputs.logits.shape[-1])
        outputs.logits = outputs.logits + bonus
        return outputs

    trainer.model.register_forward_hook(raised)


CERTAIN = [text("1+2", "3", "4")] * 4


@pytest.mark.parametrize("answer", ["chosen", "rejected"])
def test_a_certain_answer_fills_the_model_with_nan(make, answer):
    trainer = make(CERTAIN, max_steps=1)
    make_sure(trainer, answer)
    (line,) = trained(trainer)
    assert line[f"logps/{answer}"] == 0
    assert line["nll_loss"] > 1
    assert abs(line["log_odds_chosen"]) == math.inf
    if answer == "chosen":
        assert math.isfinite(line["loss"])
        assert line["loss"] == pytest.approx(line["nll_loss"], rel=1e-3)  # nothing to be seen in it
    assert math.isnan(line["grad_norm"])
    assert all(bool(weight.isnan().any()) for weight in trainer.model.parameters())


@pytest.mark.parametrize("answer", ["chosen", "rejected"])
def test_the_subclass_of_the_page_survives_a_certain_answer(make, page, monkeypatch, answer):
    trainer, plain = make(CERTAIN, max_steps=1), make(CERTAIN)
    expected = measured(plain, batch_of(plain, range(2)))
    monkeypatch.setattr(trainer, "__class__", page["SafeORPOTrainer"])
    assert measured(trainer, batch_of(trainer, range(2))) == expected  # the same as TRL's for any other pair
    for value in (0.0, -1e-12, -1e-8, -1e-6):
        pair = {name: torch.tensor([-1.0], requires_grad=True) for name in ("chosen", "rejected")}
        pair[answer] = torch.tensor([value], requires_grad=True)
        (-trainer.odds_ratio_loss(pair["chosen"], pair["rejected"])[0].sum()).backward()
        assert all(math.isfinite(mean.grad) for mean in pair.values())
    make_sure(trainer, answer)
    (line,) = trained(trainer)
    assert math.isfinite(line["loss"])
    assert math.isfinite(line["grad_norm"])
    assert all(bool(weight.isfinite().all()) for weight in trainer.model.parameters())


# ------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "max_length", "expected"),
    [(20, 40, 30, 50, (10, 10)), (20, 60, 10, 50, (50, 0)), (20, 11, 10, 30, (11, 10)), (5, 30, 30, 30, (0, 0))],
)
def test_answers_are_cut_to_what_the_longer_answer_leaves(make, prompt, chosen, rejected, max_length, expected):
    row = text("1" * prompt, "2" * (chosen - 1), "3" * (rejected - 1))  # EOS is one token more
    assert counts(make([row], max_length=chosen + rejected + prompt)) == (chosen, rejected)
    cut = make([row], max_length=max_length)
    assert counts(cut) == expected
    assert len(cut.train_dataset[0]["prompt_input_ids"]) == prompt


def test_short_answers_behind_a_long_prompt_are_kept(make):
    trainer = make([text("1" * 40, "22", "33")] * 2, max_length=30, max_steps=1)
    assert counts(trainer) == (3, 3)
    assert len(trainer.train_dataset[0]["chosen_input_ids"]) == 43
    (line,) = trained(trainer)
    assert math.isfinite(line["grad_norm"])


def test_one_empty_answer_fills_the_model_with_nan(make):
    rows = [LOPSIDED, *[text("1", "2", "3")] * 3]
    trainer = make(rows, max_length=50, per_device_train_batch_size=4, max_steps=1)
    assert counts(trainer)[1] == 0
    (line,) = trained(trainer)
    assert line["loss"] == 0.0
    assert math.isnan(line["grad_norm"])
    assert all(bool(weight.isnan().any()) for weight in trainer.model.parameters())


def test_a_text_prompt_is_ignored_if_the_answers_repeat_the_question(make):
    trainer = make([repeated("something else")])
    assert trainer.train_dataset[0]["prompt"] == "<|user|>1+2<|end|><|assistant|>"
    assert trainer.train_dataset[0]["chosen"] == "chosen<|end|>"


def test_the_first_token_of_the_prompt_counts_only_behind_a_bos(make):
    own = tokenizer(more=["<s>"])
    own.add_special_tokens({"bos_token": "<s>"})
    for trainer, expected in (
        (make([text("12", "3", "4")]), 3),
        (make([text("12", "3", "4")], processing_class=own), 4),
    ):
        batch, seen = batch_of(trainer, [0]), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.nn, "CrossEntropyLoss", lambda seen=seen: lambda _, given: seen.append(given) or _.sum()
            )
            trainer.model.resize_token_embeddings(len(trainer.processing_class))
            measured(trainer, batch)
        assert (seen[0] != -100).sum() == expected  # of 1, 2, 3, the end, and BOS
    assert words(trainer, "chosen_input_ids")[0] == "<s>"


def test_a_pad_token_equal_to_eos_does_no_harm(make):
    one, two = make(), make(processing_class=tokenizer(pad="<|end|>"))
    assert measured(one, batch_of(one, range(2)))[0] == pytest.approx(measured(two, batch_of(two, range(2)))[0])
    assert words(two, "chosen_labels")[-1] == "<|end|>"


def test_max_completion_length_does_nothing_here(make, trainer, caplog):
    other = make(max_completion_length=1)
    assert other.train_dataset["chosen_labels"] == trainer.train_dataset["chosen_labels"]
    assert "max_completion_length" not in caplog.text


def test_no_max_length_is_512(make):
    assert make(max_length=None).max_length == 512


def test_a_stream_is_refused(make):
    with pytest.raises(TypeError, match="num_proc"):
        make(Dataset.from_list(ROWS).to_iterable_dataset())


def test_new_data_cannot_be_evaluated(trainer):
    with pytest.raises(KeyError, match="chosen_input_ids"):
        trainer.evaluate(Dataset.from_list(ROWS))


def test_a_collator_of_ones_own_earns_a_warning_for_every_batch(make, caplog):
    plain = make()
    trainer = make(data_collator=plain.data_collator, eval_dataset=Dataset.from_list(ROWS))
    trainer.evaluate()
    assert caplog.text.count("prediction_step is only implemented for") == 2  # four rows, two batches
    caplog.clear()
    make(eval_dataset=Dataset.from_list(ROWS)).evaluate()
    assert "prediction_step" not in caplog.text


@pytest.mark.parametrize("padding_value", [None, 0, 7])
def test_padding_value_changes_nothing_but_the_mean_logits(make, padding_value):
    rows = [text("1", "2", "3 and more"), text("1", "2", "3")]  # the chosen half has to be filled up
    trainer = make(rows, padding_value=padding_value)
    stacked = trainer.concatenated_inputs(batch_of(trainer, range(2)), padding_value=trainer.padding_value)
    assert stacked["concatenated_input_ids"][0, -1] == (padding_value or 0)
    (loss, metrics), (expected, plain) = (
        measured(trainer, batch_of(trainer, range(2))),
        measured(make(rows), batch_of(trainer, range(2))),
    )
    assert loss == pytest.approx(expected, rel=1e-6)
    changed = {name for name in metrics if metrics[name] != pytest.approx(plain[name], rel=1e-6)}
    assert changed == ({"logits/chosen"} if padding_value else set())  # its mean runs over the padding
    assert trainer.data_collator.pad_token_id == 0


@pytest.mark.parametrize("padding_value", [None, 0])
def test_a_missing_pad_token_fails_at_the_first_batch(make, padding_value):
    own = tokenizer(pad=None)
    trainer = make(processing_class=own, padding_value=padding_value)
    assert own.pad_token is None
    with pytest.raises(ValueError, match="padding token"):
        trainer.train()


def test_with_xla_rows_are_filled_up_to_max_length(make, monkeypatch):
    monkeypatch.setattr(orpo_trainer, "is_torch_xla_available", lambda: True)
    trainer = make(max_length=40)
    row = trainer.train_dataset[0]
    lengths = {len(row[name]) for name in row if name.endswith(("_input_ids", "_labels", "_attention_mask"))}
    assert lengths == {40}
    assert words(trainer, "prompt_input_ids")[0] == "<|user|>"
    assert words(trainer, "prompt_input_ids")[-1] == "<|pad|>"  # on the right
    row = make(model=t5(), max_length=40).train_dataset[0]
    for name in ("prompt_input_ids", "prompt_attention_mask", "chosen_labels"):
        assert row[name][-1] == -100


# ------------------------------------------------------------------------------------------------------- the model


def test_a_model_by_name_keeps_the_precision_of_its_files(make, checkpoint, tmp_path):
    half = save(Qwen3ForCausalLM.from_pretrained(checkpoint).to(torch.bfloat16), tmp_path / "half")
    assert make(model=half).model.dtype == torch.bfloat16
    assert make(model=half, model_init_kwargs={"dtype": "float32"}).model.dtype == torch.float32


def test_model_init_kwargs_bring_an_automatic_device_map(make):
    trainer = make(model_init_kwargs={"dtype": "float32"})
    assert trainer.args.model_init_kwargs["device_map"] == "auto"
    assert not make().args.model_init_kwargs


def test_lora_dropout_is_switched_off(make):
    trainer = make(peft_config=LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.3))
    rates = [module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates
    assert not any(rates)


def test_the_odds_are_float32_in_a_bfloat16_model(trainer):
    means = [torch.tensor([value], dtype=torch.bfloat16) for value in (-0.5, -1.5)]
    for value in trainer.odds_ratio_loss(*means):
        assert value.dtype == torch.float32


def test_a_model_for_classification_fails_at_the_first_step(make):
    assert "AutoModelForSequenceClassification" in ORPOTrainer.__doc__
    trainer = make(model=Qwen3ForSequenceClassification(Qwen3Config(**config(pad_token_id=0))))
    with pytest.raises(ValueError, match="to match target batch_size"):
        trainer.train()


def test_model_init_does_not_work(make, checkpoint):
    own = {"model_init": lambda: Qwen3ForCausalLM.from_pretrained(checkpoint), "is_encoder_decoder": False}
    for checkpointing in (True, False):
        with pytest.raises(AttributeError, match="NoneType"):
            make(**{CHECKPOINTING: checkpointing}, **own)


def test_a_trainer_without_args_fails(checkpoint):
    with pytest.raises(AttributeError, match="NoneType"):
        ORPOTrainer(checkpoint, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer())


def test_the_sft_term_of_a_t5_covers_the_answer_only(make):
    rows = [text("1+2", "3", "4"), text("7+1", "8", "9")]  # one chosen token each: T5's tokenizer here adds no end
    trainer = make(rows, model=t5())
    _, metrics = measured(trainer, batch_of(trainer, range(2)))
    assert metrics["nll_loss"] == pytest.approx(-metrics["logps/chosen"], rel=1e-5)
    assert len(trained(trainer)) == 2


# ------------------------------------------------------------------------------------------------------- the neighbours


def test_the_neighbours_are_those_of_their_pages(page):
    numbers = torch.tensor([[-3.0, -9.0], [-5.0, -2.0], [-4.0, -4.0], [-1.0, -6.0]])
    theirs: dict = {}
    for fence in fences(PAGE.with_name("dpo.md")):
        if fence.lang == "python" and re.search(r"^def (dpo|cpo|orpo|kto|bco)_loss\(", fence.text, re.M):
            exec(fence.text, theirs)
    ours = page["dpo_loss"](*numbers, beta=0.3)
    assert float(ours) == pytest.approx(float(theirs["dpo_loss"](*numbers, beta=0.3)))
    ours = page["cpo_first_term"](*numbers[:2], beta=0.3)
    assert float(ours) == pytest.approx(float(theirs["cpo_loss"](*numbers[:2], 0.0, beta=0.3)))
    ours = page["orpo_loss"](*numbers[:2], 0.7, beta=0.3)
    assert float(ours) == pytest.approx(float(theirs["orpo_loss"](*numbers[:2], 0.7, beta=0.3)))
    ours = page["kto_loss"](*numbers[:2], kl=0.4, beta=0.3)
    assert float(ours) == pytest.approx(float(theirs["kto_loss"](*numbers[:2], kl=0.4, beta=0.3)))
    ours = page["bco_loss"](*numbers[:2], shift=0.4, beta=0.3)
    assert float(ours) == pytest.approx(float(theirs["bco_loss"](*numbers[:2], reward_shift=0.4, beta=0.3)))


def test_only_orpo_lets_go_of_the_rejected_answer(page):
    table = page["table"]
    assert set(table) == {"SFT", "ORPO, second term", "CPO, first term", "DPO", "KTO", "BCO"}
    down = {name: row[-1][1] for name, row in table.items()}
    assert down["ORPO, second term"] < 0.01
    assert all(down[name] > 0.6 for name in ("CPO, first term", "DPO", "KTO", "BCO"))
    assert down["KTO"] == down["BCO"] == 1
    assert table["DPO"] == table["CPO, first term"]
    assert all(up == pytest.approx(fall) for up, fall in table["DPO"])


def test_sft_leaves_the_prompt_out_by_default(checkpoint, tmp_path):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    rows = [{"prompt": "1+2", "completion": "3"}]
    trainer = SFTTrainer(checkpoint, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["labels"][0, :3].tolist() == [-100] * 3
    assert (batch["labels"][0, 3:] != -100).all()


# ------------------------------------------------------------------------------------------------------- the page itself


def test_the_toy_run_has_the_settings_that_the_page_names():
    script = (EXAMPLES / "orpo.py").read_text("utf-8")
    toy = script[script.index("TOY = {") : script.index("REAL = {")]
    assert '"beta": 10.0' in toy
    assert '"max_steps": 60' in toy


def test_every_test_that_the_page_names_exists():
    named = named_tests(PAGE)
    assert named
    assert named <= set(globals())


def test_the_arguments_that_the_page_calls_gone_are_gone():
    section_text = section("Older code and tutorials")
    here = arguments_of(ORPOTrainer, ORPOConfig)
    for name in ("max_prompt_length", "truncation_mode", "label_pad_token_id"):
        assert f"`{name}`" in section_text
        assert name not in here
    assert "processing_class" in here
    assert "tokenizer" not in here


def test_the_defaults_that_the_page_quotes_are_those_of_the_config(tmp_path):
    quoted, true = defaults_on(PAGE, ORPOConfig(output_dir=str(tmp_path), use_cpu=True))
    assert len(quoted) >= 5
    assert quoted == true
