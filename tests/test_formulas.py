"""The formulas of reference_guides against TRL's own trainer, and against arithmetic done another way.

For DPO the same random logits go to the functions on the page and to the real `_compute_loss` of a real `DPOTrainer`, built
with the real `DPOConfig`; only the forward pass of its tiny model is replaced, so that it returns those logits. Losses and
their gradients in the logits must agree to 1e-5 (relative, float32).

`pytest -s tests/test_formulas.py` prints how many formulas, blocks and comparisons there were, and the largest error.
"""

import ast
import copy
import functools
import importlib
import inspect
import math
import os
import re
import string
import tempfile
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network, and TRL would send a telemetry ping
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import markdown_pages
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from markdown_pages import GUIDES, formulas, markdown_files, named_formulas, ran, symbols
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl import DPOConfig, DPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import selective_log_softmax

TOLERANCE = 1e-5
SEEDS = (0, 1, 2)
TESTS = Path(__file__).resolve().parent
VOCABULARY = 13
PAGE = GUIDES / "preference_losses.md"
DIVERGENCES = {
    "reverse_kl": "f-reverse-kl",
    "forward_kl": "f-forward-kl",
    "js_divergence": "f-js-divergence",
    "alpha_divergence": "f-alpha-divergence",
}

disable_progress_bars()
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


# --- the formulas on the pages -----------------------------------------------------------------------------------------


@functools.cache
def guides():
    """(formula name -> its function, number of blocks run), from running every guide once."""
    functions, blocks = {}, 0
    for path in sorted(GUIDES.glob("*.md")):
        run = ran(path)
        blocks += len(run.blocks)
        for found in formulas(path):
            assert found.name not in functions, f"{found.fence.where}: formula {found.name!r} is on two pages"
            functions[found.name] = run.namespace[found.function]
            if gradient := run.namespace.get(found.function + "_gradient"):
                functions[found.name + "-gradient"] = gradient
    return functions, blocks


CALLED: set[str] = set()
CHECKED: dict[str, str] = {}  # formula name -> the test that checks it


def formula(name):
    """The function of a formula; calling it is noted, so that a test cannot claim a formula that it never computes."""
    function = guides()[0][name]

    @functools.wraps(function)
    def noted(*args, **kwargs):
        CALLED.add(name)
        return function(*args, **kwargs)

    return noted


def checks(*names):
    """Marks a test as the one that checks these formulas, and fails it if it did not call each of them."""

    def decorate(test):
        CHECKED.update(dict.fromkeys(names, test.__name__))

        @functools.wraps(test)
        def run(*args, **kwargs):
            CALLED.clear()
            test(*args, **kwargs)
            assert set(names) <= CALLED, f"{test.__name__} never computed {sorted(set(names) - CALLED)}"

        return run

    return decorate


def call(name, values):
    """Calls a formula with those of the values that its parameters are named after."""
    function = formula(name)
    return function(**{key: values[key] for key in inspect.signature(function).parameters})


def loss_formula(loss_type):
    return "dpo-" + loss_type.replace("_", "-")


# --- TRL's side ----------------------------------------------------------------------------------------------------------


def dispatched(variable):
    """The strings that `_compute_loss` compares `variable` with, read from TRL's source without running it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(DPOTrainer._compute_loss)))
    return [
        node.comparators[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq) and ast.unparse(node.left) == variable
    ]


LOSS_TYPES = dispatched("loss_type")


@functools.cache
def tiny_model(seed):
    torch.manual_seed(seed)
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, num_key_value_heads=1, **size))


@functools.cache
def tokenizer():
    vocabulary = {letter: n for n, letter in enumerate("?.#" + string.ascii_lowercase[: VOCABULARY - 3])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=".", pad_token="#")


@functools.cache
def one_row():
    return Dataset.from_list([{"prompt": "a", "chosen": "b.", "rejected": "c."}])


def make_trainer(model=None, **config):
    """A real DPOTrainer with this configuration. It is never trained: no output is written, no row is tokenized."""
    args = DPOConfig(tempfile.gettempdir(), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **config)
    with patch.object(DPOTrainer, "_prepare_dataset", lambda self, dataset, *args: dataset):
        return DPOTrainer(
            model or tiny_model(0), tiny_model(1), args, train_dataset=one_row(), processing_class=tokenizer()
        )


@dataclass
class Batch:
    inputs: dict  # what TRL's collator makes of ragged rows: input_ids, attention_mask, completion_mask, all (2B, T)
    logits: torch.Tensor  # (2B, T, V), with gradient
    ref_logits: torch.Tensor  # (2B, T, V)


def random_batch(seed, pairs=4, spread=1.0, dtype=torch.float32):
    """Ragged random rows through TRL's own collator, and random logits for them; the reference is `spread` away."""
    dice = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = torch.randint(low, high, (1,), generator=dice)
        return torch.randint(3, VOCABULARY, (int(length),), generator=dice).tolist()

    rows = [{"prompt_ids": ids(1, 5), "chosen_ids": ids(1, 8), "rejected_ids": ids(1, 8)} for _ in range(pairs)]
    inputs = DataCollatorForPreference(pad_token_id=2)(rows)
    shape = (*inputs["input_ids"].shape, VOCABULARY)
    logits = 2 * torch.randn(shape, generator=dice, dtype=dtype)
    ref_logits = logits + spread * torch.randn(shape, generator=dice, dtype=dtype)
    return Batch(inputs, logits.requires_grad_(), ref_logits)


@contextmanager
def forward_returns(model, logits):
    with patch.object(model, "forward", lambda **kwargs: CausalLMOutputWithPast(logits=logits)):
        yield


def trl_loss(trainer, batch):
    """The loss that TRL's own `_compute_loss` gives when its two models return the logits of the batch."""
    with forward_returns(trainer.model, batch.logits), forward_returns(trainer.ref_model, batch.ref_logits):
        return trainer._compute_loss(trainer.model, dict(batch.inputs), return_outputs=False)


def margin_batch(margin, tokens=1, start=1):
    """One pair whose log-ratios are +margin/2 and -margin/2, on completions of `tokens` tokens that begin at `start`."""
    ids = torch.ones(2, start + tokens, dtype=torch.long)
    mask = torch.zeros_like(ids)
    mask[:, start:] = 1
    predicted = int(mask[0, 1:].sum())  # a first token at position 0 is not predicted
    certain, unlikely = torch.zeros(
        2, start + tokens, 2
    )  # two logits at each position; token 1 is the one that stands there
    certain[:, 0] = -200.0  # log p = 0
    unlikely[:, 0] = math.log(math.expm1(margin / 2 / predicted))  # log p = -margin / 2 / predicted
    logits, ref_logits = torch.stack([certain, unlikely]), torch.stack([unlikely, certain])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    return Batch(inputs, logits.requires_grad_(), ref_logits)


def swapped(batch):
    """The same pair, ordered wrongly."""
    return Batch(batch.inputs, batch.logits.detach().flip(0).requires_grad_(), batch.ref_logits.flip(0))


# --- our side ------------------------------------------------------------------------------------------------------------

SETTINGS = dict(beta=0.3, label_smoothing=0.0, discopop_tau=0.2, f_alpha_divergence_coef=0.3)


def quantities(batch, settings):
    """Everything that a formula may ask for, by the name of its parameter, from the logits on with the pages' own functions."""
    values = SETTINGS | settings
    mask, labels = batch.inputs["completion_mask"][:, 1:], batch.inputs["input_ids"][:, 1:]
    lens = mask.sum(dim=1)
    values["chosen_lens"], values["rejected_lens"] = lens.chunk(2)
    shared = torch.minimum(*lens.chunk(2)).repeat(2)

    def per_completion(logits, ld_alpha):
        per_token = formula("token-logprob")(logits[:, :-1], labels)
        if ld_alpha is None:
            return formula("sequence-logprob")(per_token, mask).chunk(2)
        return formula("ld-dpo")(per_token, mask, shared, ld_alpha).chunk(2)

    ld_alpha = values.get("ld_alpha")
    values["chosen_logps"], values["rejected_logps"] = per_completion(batch.logits, ld_alpha)
    values["ref_chosen_logps"], values["ref_rejected_logps"] = per_completion(batch.ref_logits, ld_alpha)
    values["unweighted_chosen_logps"], _ = per_completion(batch.logits, None)
    for side in ("chosen", "rejected"):
        values[f"{side}_logratios"] = formula("log-ratio")(values[f"{side}_logps"], values[f"ref_{side}_logps"])
    return values


def our_loss(batch, loss_type, loss_weights=None, f_divergence_type="reverse_kl", use_weighting=False, **settings):
    """The loss of the batch, put together from the functions on the pages."""
    values = quantities(batch, settings)
    for side in ("chosen_logratios", "rejected_logratios"):
        values[side] = call(DIVERGENCES[f_divergence_type], values | {"logratios": values[side]})
    terms = []
    for kind in loss_type:
        # the supervised term knows nothing of ld_alpha
        special = {"chosen_logps": values["unweighted_chosen_logps"]} if kind == "sft" else {}
        losses = call(loss_formula(kind), values | special)
        if use_weighting:
            logits, labels = batch.logits[:, :-1], batch.inputs["input_ids"][:, 1:]
            per_token = formula("token-logprob")(logits, labels)
            weights = formula("wpo-weight")(logits, per_token, batch.inputs["completion_mask"][:, 1:])
            losses = formula("wpo-loss")(losses, *weights.chunk(2))
        terms.append(losses)
    return formula("mixed-loss")(terms, loss_weights or [1.0] * len(terms))


ERRORS: list[float] = []


def relative_error(ours, theirs):
    """Largest difference over the largest value; 0 where both are all zero."""
    ours, theirs = ours.detach(), theirs.detach()
    assert torch.isfinite(ours).all() and torch.isfinite(theirs).all()
    scale = theirs.abs().max()
    difference = (ours - theirs).abs().max()
    return float(difference / scale) if scale > 0 else float(difference)


def compare(loss_type, seeds=SEEDS, **settings):
    """Asserts that loss and gradient on the page equal TRL's for one configuration."""
    trainer = make_trainer(loss_type=loss_type, **SETTINGS | settings)
    for seed in seeds:
        batch = random_batch(seed)
        results = []
        for loss in (our_loss(batch, loss_type, **settings), trl_loss(trainer, batch)):
            (gradient,) = torch.autograd.grad(loss, batch.logits)
            results.append((loss, gradient))
        for what, ours, theirs in zip(("loss", "gradient"), *results, strict=True):
            error = relative_error(ours, theirs)
            ERRORS.append(error)
            assert error < TOLERANCE, f"{loss_type} {settings} seed {seed}: {what} differs from TRL's by {error:.1e}"


# --- the table on the page that says which option works with which loss ---------------------------------------------------


def table_rows(path, first_header):
    """The rows of the Markdown table whose first header is this, as {header: cell}."""
    lines = path.read_text("utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first_header} |"))
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[start:]]
    length = next((n for n, line in enumerate(lines[start:]) if not line.startswith("|")), len(cells))
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:length]]


def options():
    """loss type -> {option: what the page says it does}."""
    return {re.search(r"`(\w+)`", row["`loss_type`"])[1]: row for row in table_rows(PAGE, "`loss_type`")}


def allowed(loss_type, option):
    return options()[loss_type][f"`{option}`"] in {"works", "ignored", "required"}


def smoothing(loss_type):
    """Values of label_smoothing to compare with: both where it counts, and one that must not count where it is ignored."""
    return {"works": (0.0, 0.2), "required": (0.01, 0.2), "ignored": (0.2,)}[options()[loss_type]["`label_smoothing`"]]


# --- tests: DPO against TRL -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    functions, blocks = guides()
    named = [name for name in functions if not name.endswith("-gradient") or name == "dpo-gradient"]
    print(f"\n{len(named)} formulas, {blocks} blocks run; ", end="")
    print(f"{len(ERRORS)} comparisons with TRL, largest relative error {max(ERRORS, default=0):.1e}")


def test_every_loss_type_of_trl_has_a_formula_and_a_row():
    assert len(LOSS_TYPES) > 1, "no loss types found in the source of _compute_loss: has TRL moved them?"
    assert {loss_formula(loss_type) for loss_type in LOSS_TYPES} <= set(guides()[0])
    assert set(options()) == set(LOSS_TYPES)
    assert len(LOSS_TYPES) == 15, "the page and the index of the guides say that there are fifteen"


def test_every_divergence_of_trl_has_a_formula():
    found = dispatched("self.f_divergence_type")
    assert len(found) > 1, "no divergences found in the source of _compute_loss: has TRL moved them?"
    assert set(found) == set(DIVERGENCES)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_equals_trl(loss_type):
    divergences = DIVERGENCES if allowed(loss_type, "f_divergence_type") else ["reverse_kl"]
    weightings = (False, True) if allowed(loss_type, "use_weighting") else (False,)
    for f_divergence_type, use_weighting, ld_alpha, label_smoothing in product(
        divergences, weightings, (None, 0.5), smoothing(loss_type)
    ):
        compare(
            [loss_type],
            f_divergence_type=f_divergence_type,
            use_weighting=use_weighting,
            ld_alpha=ld_alpha,
            label_smoothing=label_smoothing,
        )


@checks("dpo-loss")
def test_dpo_loss_from_four_log_probabilities_equals_trl():
    for seed in SEEDS:
        batch = random_batch(seed)
        ours = call("dpo-loss", quantities(batch, {}))
        assert relative_error(ours, trl_loss(make_trainer(beta=SETTINGS["beta"]), batch)) < TOLERANCE


@pytest.mark.parametrize("path", [p for p in markdown_files() if p.parent != GUIDES], ids=markdown_pages.shown)
def test_formulas_on_other_pages_equal_those_of_the_guides(path):
    blocks = {found.name: found.function for found in named_formulas(path) if found.block}
    namespace = ran(path).namespace if blocks else {}
    values = quantities(random_batch(0), {})
    for name, function in blocks.items():
        theirs = inspect.signature(namespace[function]).parameters
        ours = namespace[function](**{key: values[key] for key in theirs})
        assert relative_error(torch.as_tensor(ours), torch.as_tensor(call(name, values))) < TOLERANCE, name


@pytest.mark.parametrize("ld_alpha", [0.0, 1.0])
def test_ld_dpo_equals_trl_at_both_ends_of_its_range(ld_alpha):
    compare(["sigmoid"], ld_alpha=ld_alpha)


@pytest.mark.parametrize("f_alpha_divergence_coef", [0.0, 0.5, 1.0, 2.0])
def test_alpha_divergence_equals_trl_on_its_whole_range(f_alpha_divergence_coef):
    compare(["sigmoid"], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=f_alpha_divergence_coef)


@pytest.mark.parametrize(
    "loss_type, settings",
    [
        (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),  # MPO
        (["sigmoid", "sft"], {}),
        (["ipo", "robust"], {"loss_weights": [0.3, 2.0], "label_smoothing": 0.1, "use_weighting": True}),
        (["discopop", "sigmoid_norm"], {"f_divergence_type": "js_divergence", "ld_alpha": 0.5}),
        (["aot", "nca_pair"], {"loss_weights": [1.0, 0.5], "ld_alpha": 0.2}),
    ],
)
def test_sum_of_losses_equals_trl(loss_type, settings):
    compare(loss_type, **settings)


@checks("token-logprob", "sequence-logprob", "ld-dpo")
def test_log_probabilities_equal_trl():
    for seed, ld_alpha in product(SEEDS, (None, 0.4)):
        batch = random_batch(seed)
        trainer = make_trainer(ld_alpha=ld_alpha)
        labels = batch.inputs["input_ids"][:, 1:]
        per_token = formula("token-logprob")(batch.logits[:, :-1], labels)
        assert relative_error(per_token, selective_log_softmax(batch.logits[:, :-1], labels)) < TOLERANCE
        with forward_returns(trainer.ref_model, batch.ref_logits):
            theirs = trainer.compute_ref_log_probs(trainer.ref_model, dict(batch.inputs))
        values = quantities(batch, {"ld_alpha": ld_alpha})
        for side, expected in zip(("chosen", "rejected"), theirs, strict=True):
            assert relative_error(values[f"ref_{side}_logps"], expected) < TOLERANCE


@checks(
    "metric-rewards", "metric-margins", "metric-accuracies", "metric-logps",
    "metric-entropy", "metric-token-accuracy", "metric-logits",
)  # fmt: skip
@pytest.mark.parametrize("seed", SEEDS)
def test_logged_metrics_equal_trl(seed):
    batch = random_batch(seed)
    trainer = make_trainer(beta=SETTINGS["beta"])
    trl_loss(trainer, batch)
    logged = {key: values[-1] for key, values in trainer._metrics["train"].items()}

    values = quantities(batch, {})
    logits, labels = batch.logits[:, :-1], batch.inputs["input_ids"][:, 1:]
    mask = batch.inputs["completion_mask"][:, 1:]
    chosen, rejected = zip(logits.chunk(2), labels.chunk(2), mask.chunk(2), strict=False)
    ours = {
        "rewards/margins": call("metric-margins", values),
        "rewards/accuracies": call("metric-accuracies", values),
        "entropy": formula("metric-entropy")(logits, mask),
        "mean_token_accuracy": formula("metric-token-accuracy")(*chosen),
        "logits/chosen": formula("metric-logits")(chosen[0], chosen[2]),
        "logits/rejected": formula("metric-logits")(rejected[0], rejected[2]),
    }
    ours["rewards/chosen"], ours["rewards/rejected"] = call("metric-rewards", values)
    ours["logps/chosen"], ours["logps/rejected"] = call("metric-logps", values)
    for key, value in ours.items():
        assert value.item() == pytest.approx(logged.pop(key), rel=TOLERANCE), key
    assert set(logged) == {"num_tokens"}, "TRL logs a metric that the page does not have"


@checks("tr-dpo")
def test_reference_sync_equals_trl():
    policy, reference = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = [parameter.clone() for parameter in reference.parameters()]
    args = DPOConfig(tempfile.gettempdir(), use_cpu=True, bf16=False, ref_model_mixup_alpha=0.3, ref_model_sync_steps=2)
    callback = SyncRefModelCallback(ref_model=reference, accelerator=make_trainer().accelerator)

    def end_of_step(number):
        state = type("State", (), {"global_step": number})
        callback.on_step_end(args, state, None, model=policy)

    end_of_step(1)
    for parameter, old in zip(reference.parameters(), before, strict=True):
        assert torch.equal(parameter, old), "the reference moved at a step that is no multiple of ref_model_sync_steps"
    end_of_step(2)
    for parameter, old, target in zip(reference.parameters(), before, policy.parameters(), strict=True):
        assert relative_error(formula("tr-dpo")(target, old, args.ref_model_mixup_alpha), parameter) < TOLERANCE


# --- tests: slopes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_slopes_of_each_loss_equal_autograd(loss_type):
    for seed in range(5):
        values = quantities(random_batch(seed, pairs=6), {"label_smoothing": 0.1})
        values = {key: v.detach() if torch.is_tensor(v) else v for key, v in values.items()}
        # some losses are written in the log-ratios, others in the log-probabilities: the slope is the same
        parameters = inspect.signature(guides()[0][loss_formula(loss_type)]).parameters
        kind = "logps" if "chosen_logps" in parameters else "logratios"
        sides = [values[f"{side}_{kind}"].requires_grad_() for side in ("chosen", "rejected")]
        expected = torch.autograd.grad(call(loss_formula(loss_type), values).sum(), sides, allow_unused=True)
        with torch.no_grad():
            found = call(loss_formula(loss_type) + "-gradient", values)
        for ours, autograd in zip(found, expected, strict=True):
            autograd = torch.zeros_like(ours) if autograd is None else autograd
            assert relative_error(ours, autograd) < TOLERANCE


@pytest.mark.parametrize("name", DIVERGENCES.values())
def test_slope_of_each_divergence_equals_autograd(name):
    logratios = torch.linspace(-4, 4, 17).requires_grad_()
    values = {"logratios": logratios, "f_alpha_divergence_coef": 0.3}
    (autograd,) = torch.autograd.grad(call(name, values).sum(), logratios)
    assert relative_error(call(name + "-gradient", values), autograd) < TOLERANCE


@checks("dpo-gradient")
def test_dpo_gradient_equals_autograd():
    theta = torch.randn(5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reference = torch.full((5,), 0.2).log()
    logps = theta.log_softmax(0)
    loss = formula("dpo-sigmoid")(logps[1] - reference[1], logps[3] - reference[3], beta=0.7)
    (autograd,) = torch.autograd.grad(loss, theta, retain_graph=True)
    directions = [torch.autograd.grad(logps[n], theta, retain_graph=True)[0] for n in (1, 3)]
    ours = formula("dpo-gradient")(logps[1] - reference[1], logps[3] - reference[3], *directions, beta=0.7)
    assert relative_error(ours, autograd) < TOLERANCE


# --- tests: the derivation ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=SEEDS)
def bandit(request):
    """(reference probabilities, rewards, beta) of one prompt with seven completions."""
    dice = torch.Generator().manual_seed(request.param)
    return torch.randn(7, generator=dice).softmax(0), torch.randn(7, generator=dice), (0.3, 1.0, 3.0)[request.param]


@checks("bradley-terry")
def test_bradley_terry_is_a_softmax_over_two_rewards():
    rewards = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert relative_error(formula("bradley-terry")(*rewards), rewards.softmax(dim=0)[0]) < TOLERANCE


@checks("kl-objective", "kl-divergence")
def test_objective_is_reward_minus_torchs_own_kl(bandit):
    reference, rewards, beta = bandit
    policy = torch.randn(7, generator=torch.Generator().manual_seed(9)).softmax(0)
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(p) for p in (policy, reference)))
    assert relative_error(formula("kl-divergence")(policy, reference), kl) < TOLERANCE
    assert (
        relative_error(formula("kl-objective")(policy, reference, rewards, beta), policy @ rewards - beta * kl)
        < TOLERANCE
    )


@checks("optimal-policy", "partition-function", "kl-objective")
def test_optimal_policy_is_where_gradient_ascent_ends(bandit):
    reference, rewards, beta = bandit
    best = formula("optimal-policy")(*bandit)
    assert best.sum().item() == pytest.approx(1, abs=1e-6)
    unnormalized = (reference.log() + rewards / beta).logsumexp(0).exp()
    assert relative_error(formula("partition-function")(*bandit), unnormalized) < TOLERANCE
    theta = torch.zeros(7, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -formula("kl-objective")(theta.softmax(0), *bandit)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(theta.softmax(0), best, atol=1e-3)


@checks("objective-gap", "optimal-policy")
def test_objective_is_a_constant_minus_the_distance_to_the_optimum(bandit):
    best = formula("optimal-policy")(*bandit)
    constant = formula("objective-gap")(best, *bandit)
    for seed in range(20):
        policy = (2 * torch.randn(7, generator=torch.Generator().manual_seed(seed))).softmax(0)
        objective = guides()[0]["kl-objective"](policy, *bandit)
        assert torch.isclose(formula("objective-gap")(policy, *bandit), objective, atol=1e-5)
        assert objective < constant


@checks("implicit-reward", "log-ratio", "dpo-preference")
def test_optimum_gives_the_rewards_back_and_the_partition_function_cancels(bandit):
    reference, rewards, beta = bandit
    functions = guides()[0]
    best, Z = functions["optimal-policy"](*bandit), functions["partition-function"](*bandit)
    assert torch.allclose(formula("implicit-reward")(best, reference, beta, Z), rewards, atol=1e-4)
    logratios = formula("log-ratio")(best.log(), reference.log())
    pairs = torch.combinations(torch.arange(7))
    preference = formula("dpo-preference")(logratios[pairs[:, 0]], logratios[pairs[:, 1]], beta)
    expected = functions["bradley-terry"](rewards[pairs[:, 0]], rewards[pairs[:, 1]])
    assert torch.allclose(preference, expected, atol=1e-5)


@checks("dpo-margin")
def test_margin_gives_the_probability_that_it_was_made_for():
    for preference, beta in product((0.1, 0.5, 0.99), (0.05, 2.0)):
        assert 1 / (1 + math.exp(-beta * formula("dpo-margin")(preference, beta))) == pytest.approx(preference)


@checks("mean-logprob", "mean-over-completions", "mean-over-tokens")
def test_means_equal_a_loop_over_the_tokens():
    per_token = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.25, -0.125]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    kept = [
        [value for value, m in zip(*row, strict=True) if m]
        for row in zip(per_token.tolist(), mask.tolist(), strict=True)
    ]
    means = [sum(row) / len(row) for row in kept]
    assert formula("mean-logprob")(per_token, mask).tolist() == pytest.approx(means)
    assert formula("mean-over-completions")(per_token, mask).item() == pytest.approx(-sum(means) / len(means))
    flat = [value for row in kept for value in row]
    assert formula("mean-over-tokens")(per_token, mask).item() == pytest.approx(-sum(flat) / len(flat))


@checks("wpo-weight", "wpo-loss", "mixed-loss")
def test_weights_are_constants_and_weighted_losses_add_up():
    per_token = torch.tensor(
        [[0.5, 0.25]]
    ).log()  # two tokens of a policy that is uniform over two and over four tokens
    logits = torch.tensor([[[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]]]).log()
    assert formula("wpo-weight")(logits, per_token, torch.tensor([[1, 1]])).item() == pytest.approx(1)
    losses, weights = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0.5, 2.0], requires_grad=True)
    loss = formula("wpo-loss")(losses, weights, weights)
    assert loss.item() == pytest.approx((0.25 * 1 + 4 * 3) / 2)
    slopes = torch.autograd.grad(loss, [losses, weights], allow_unused=True)
    assert slopes[0].tolist() == [0.125, 2.0] and slopes[1] is None
    assert formula("mixed-loss")([losses, losses], [0.5, 2.0]).item() == pytest.approx(2.5 * 2)


def test_example_by_hand_is_what_trl_computes():
    tokens, results = table_rows(PAGE, "completion"), table_rows(PAGE, "quantity")
    numbers = {}
    for row in tokens:
        values = [float(row[f"token {n}"]) for n in (1, 2, 3) if row[f"token {n}"]]
        assert sum(values) == pytest.approx(float(row["sum"]), abs=1e-9)
        numbers[row["completion"], row["model"]] = values
    # a vocabulary of two: token 1 has the log-probability of the table, token 0 the rest
    rows = [
        {"prompt_ids": [0], **{f"{side}_ids": [1] * len(numbers[side, "policy"]) for side in ("chosen", "rejected")}}
    ]
    inputs = DataCollatorForPreference(pad_token_id=0)(rows)

    def logits(model):
        out = torch.zeros(*inputs["input_ids"].shape, 2)
        for n, side in enumerate(("chosen", "rejected")):
            for t, logp in enumerate(numbers[side, model]):
                out[n, t] = torch.tensor([math.log1p(-math.exp(logp)), logp])
        return out

    batch = Batch(inputs, logits("policy").requires_grad_(), logits("reference"))
    expected = {row["quantity"].replace("`", ""): float(row["value"]) for row in results}
    trainer = make_trainer(beta=0.1)
    found = {f"loss, {kind}": trl_loss(make_trainer(beta=0.1, loss_type=kind), batch).item() for kind in ("ipo", "sft")}
    found["loss, sigmoid"] = trl_loss(trainer, batch).item()
    found |= {key: trainer._metrics["train"][key][-1] for key in expected if key.startswith("rewards/")}
    values = quantities(batch, {"beta": 0.1})
    found["$h_w$"], found["$h_l$"] = values["chosen_logratios"].item(), values["rejected_logratios"].item()
    found[r"$\Delta$"] = found["$h_w$"] - found["$h_l$"]
    found["$g_w$"] = call("dpo-sigmoid-gradient", values)[0].item()
    assert found == pytest.approx(expected, abs=5.1e-4)


# --- tests: what the page says about TRL beyond the formulas --------------------------------------------------------------------


def loss_with(loss_type, batch=None, backward=False, **settings):
    batch = batch or random_batch(0)
    loss = trl_loss(make_trainer(loss_type=[loss_type], **SETTINGS | settings), batch)
    if backward:
        loss.backward()
    return loss.item()


def what_an_option_does(loss_type, option, first, second):
    """ "refused", "required", "fails", "ignored" or "works", found by running TRL with two values of the option."""
    base = {"label_smoothing": 0.1} if loss_type == "exo_pair" else {}
    try:
        before = loss_with(loss_type, **base | {option: first})
    except ValueError:
        return "required"
    try:
        make_trainer(loss_type=[loss_type], **base | {option: second})
    except (ValueError, NotImplementedError):
        return "refused"
    try:
        after = loss_with(loss_type, backward=True, **base | {option: second})
    except RuntimeError:
        return "fails"
    return "ignored" if before == after else "works"


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_options_do_what_the_table_says(loss_type):
    tried = {
        "f_divergence_type": ("reverse_kl", "js_divergence"),
        "label_smoothing": (0.0, 0.2),
        "use_weighting": (False, True),
        "ld_alpha": (None, 0.5),
    }
    found = {f"`{option}`": what_an_option_does(loss_type, option, *values) for option, values in tried.items()}
    row = options()[loss_type]
    assert found == {option: row[option] for option in found}


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_aot_with_one_pair_is_sigmoid_and_with_more_is_not(loss_type):
    for pairs, same in ((1, True), (6, False)):
        batch = random_batch(3, pairs=pairs, spread=2.0)
        assert (loss_with(loss_type, batch) == pytest.approx(loss_with("sigmoid", batch), rel=1e-6)) is same


def test_robust_divides_by_zero_at_one_half():
    batch = random_batch(0)
    assert not math.isfinite(loss_with("robust", batch, label_smoothing=0.5))


def test_robust_can_be_negative():
    batch = margin_batch(60.0)
    assert loss_with("robust", batch, label_smoothing=0.2) < 0


def test_discopop_first_makes_the_chosen_completion_less_likely():
    batch = random_batch(0, spread=0.0)  # the policy is its own reference, as at the first step
    slopes = {}
    for kind in ("sigmoid", "discopop"):
        values = quantities(batch, {})
        (gradient,) = torch.autograd.grad(trl_loss(make_trainer(loss_type=kind), batch), batch.logits)
        step = batch.logits - 1e-2 * gradient
        after = quantities(Batch(batch.inputs, step, batch.ref_logits), {})
        slopes[kind] = ((after["chosen_logps"] - values["chosen_logps"]) > 0).tolist()
    assert all(slopes["sigmoid"]) and not any(slopes["discopop"])


def test_discopop_overflows_on_a_very_negative_margin():
    batch = swapped(margin_batch(100.0))
    assert math.isnan(loss_with("discopop", batch, beta=1.0, discopop_tau=0.05))
    assert math.isfinite(loss_with("sigmoid", batch, beta=1.0))


def test_ipo_is_the_papers_loss_only_for_completions_of_one_token():
    beta = 0.1
    for tokens, same in ((1, True), (4, False)):
        batch = margin_batch(3.0, tokens=tokens)
        paper = (3.0 - 1 / (2 * beta)) ** 2
        assert (loss_with("ipo", batch, beta=beta) == pytest.approx(paper, rel=1e-4)) is same


def test_ipo_counts_a_first_token_that_nothing_predicts():
    beta = 0.1
    batch = margin_batch(3.0, tokens=2, start=0)  # two tokens, one of them predicted
    assert loss_with("ipo", batch, beta=beta) == pytest.approx((3.0 / 2 - 1 / (2 * beta)) ** 2, rel=1e-4)


@pytest.mark.parametrize("loss_type, cancels", [("sigmoid", True), ("sigmoid_norm", False), ("ipo", False)])
def test_a_term_of_the_prompt_cancels_only_without_length_normalization(loss_type, cancels):
    values = quantities(random_batch(0), {})
    assert (values["chosen_lens"] != values["rejected_lens"]).any()
    shifted = values | {f"{side}_logratios": values[f"{side}_logratios"] + 2.0 for side in ("chosen", "rejected")}
    same = torch.allclose(call(loss_formula(loss_type), values), call(loss_formula(loss_type), shifted), atol=1e-5)
    assert same is cancels


def test_sft_is_a_mean_over_tokens_and_not_over_completions():
    batch = random_batch(0)
    per_token = formula("token-logprob")(batch.logits[:, :-1], batch.inputs["input_ids"][:, 1:]).chunk(2)[0]
    mask = batch.inputs["completion_mask"][:, 1:].chunk(2)[0]
    loss = loss_with("sft", batch)
    assert loss == pytest.approx(formula("mean-over-tokens")(per_token, mask).item(), rel=TOLERANCE)
    assert loss != pytest.approx(formula("mean-over-completions")(per_token, mask).item(), rel=1e-2)


def test_apo_down_moves_only_the_rejected_completion_at_first():
    batch = random_batch(0, spread=0.0)
    loss = trl_loss(make_trainer(loss_type="apo_down"), batch)
    chosen, rejected = torch.autograd.grad(loss, batch.logits)[0].chunk(2)
    assert chosen.abs().max() < 1e-7 < 1e-3 < rejected.abs().max()


def test_alpha_of_trl_is_one_minus_alpha_of_the_paper():
    batch = random_batch(0)

    def paper(logratios, alpha):  # f-DPO, table of derivatives: (1 - u^-alpha) / alpha
        return (1 - logratios.exp() ** -alpha) / alpha

    values = quantities(batch, {})
    for alpha, same in ((0.3, False), (0.7, True), (0.5, None)):
        trl = loss_with("sigmoid", batch, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3)
        scores = [paper(values[f"{side}_logratios"], alpha) for side in ("chosen", "rejected")]
        ours = formula("dpo-sigmoid")(*scores, beta=SETTINGS["beta"]).mean().item()
        if same is not None:
            assert (ours == pytest.approx(trl, rel=1e-4)) is same


def test_alpha_divergence_stops_in_float64():
    batch = random_batch(0, dtype=torch.float64)
    with pytest.raises(KeyError):
        loss_with("sigmoid", batch, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5)
    assert math.isfinite(loss_with("sigmoid", batch, f_divergence_type="js_divergence"))


def test_alpha_divergence_has_no_gradient_beyond_its_cut():
    for margin, moves in ((100.0, True), (400.0, False)):  # exponents 25 and 100, cut at 80
        batch = swapped(margin_batch(margin))
        trainer = make_trainer(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5, beta=1e-9)
        (gradient,) = torch.autograd.grad(trl_loss(trainer, batch), batch.logits)
        assert (gradient[0].abs().max().item() != 0) is moves


def test_logged_rewards_do_not_know_the_divergence():
    batch = random_batch(0)
    rewards = []
    for f_divergence_type in ("reverse_kl", "forward_kl"):
        trainer = make_trainer(f_divergence_type=f_divergence_type)
        trl_loss(trainer, batch)
        rewards.append(trainer._metrics["train"]["rewards/margins"])
    assert rewards[0] == rewards[1]


def test_ld_alpha_outside_its_range_is_accepted_and_changes_the_logged_log_probabilities():
    batch = random_batch(0)
    logged = []
    for ld_alpha in (None, 2.0):
        trainer = make_trainer(ld_alpha=ld_alpha)
        trl_loss(trainer, batch)
        logged.append(trainer._metrics["train"]["logps/chosen"] + trainer._metrics["train"]["logps/rejected"])
    assert logged[0] != logged[1]


def test_weight_of_a_likely_completion_exceeds_one():
    probs = torch.tensor([[[0.7, 0.3]]])
    weight = formula("wpo-weight")(probs.log(), probs[..., 0].log(), torch.tensor([[1]]))
    assert weight.item() == pytest.approx(0.7 / 0.58)
    logits = (
        torch.tensor([0.3, 0.7]).log().expand(2, 2, 2).clone().requires_grad_()
    )  # token 1 is 70 % likely everywhere
    batch = Batch(margin_batch(1.0).inputs, logits, logits.detach())
    assert loss_with("sigmoid", batch, use_weighting=True) == pytest.approx(math.log(2) * (0.7 / 0.58) ** 2)


def test_weights_of_a_sum_are_one_each_and_not_averaged():
    batch = random_batch(0)
    trainer = make_trainer(loss_type=["sigmoid", "sigmoid"], **SETTINGS)
    assert trl_loss(trainer, batch).item() == pytest.approx(2 * loss_with("sigmoid", batch))


def test_first_step_has_the_loss_that_the_page_gives_and_accuracy_zero():
    batch = random_batch(0, spread=0.0)
    for loss_type, beta, expected in (
        ("sigmoid", 0.01, math.log(2)), ("sigmoid", 1.0, math.log(2)), ("ipo", 0.1, 25), ("sppo_hard", 0.1, 50),
    ):  # fmt: skip
        trainer = make_trainer(loss_type=loss_type, beta=beta)
        assert trl_loss(trainer, batch).item() == pytest.approx(expected)
        assert trainer._metrics["train"]["rewards/accuracies"] == [0.0]


@pytest.mark.parametrize(
    "loss_type, target",
    [
        ("ipo", 4 * 1 / (2 * 0.5)),  # per token, on four tokens
        ("exo_pair", math.log(0.9 / 0.1) / 0.5),
        ("nca_pair", math.log(2) / 0.5),
        ("sppo_hard", 1 / (2 * 0.5)),
    ],
)
def test_losses_with_a_target_stop_pushing_the_chosen_completion_there(loss_type, target):
    values = SETTINGS | dict(
        beta=0.5, label_smoothing=0.1, chosen_lens=torch.tensor([4.0]), rejected_lens=torch.tensor([4.0])
    )
    values |= dict(chosen_logratios=torch.tensor([target]), rejected_logratios=torch.tensor([0.0]))
    chosen_grad, _ = call(loss_formula(loss_type) + "-gradient", values)
    assert chosen_grad.item() == pytest.approx(0, abs=1e-6)


def test_precomputed_references_and_adapters_are_refused_with_sync():
    with pytest.raises(ValueError, match="sync_ref_model"):
        make_trainer(sync_ref_model=True, precompute_ref_log_probs=True)
    adapted = get_peft_model(copy.deepcopy(tiny_model(0)), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="sync_ref_model"):
        make_trainer(model=adapted, sync_ref_model=True)


@pytest.mark.parametrize(
    "option, absent, present",
    [("label_smoothing", "AOT", "EXO"), ("f_alpha_divergence_coef", "t^", "u^-α")],
)
def test_help_texts_that_the_page_corrects_still_say_so(option, absent, present):
    help_text = DPOConfig.__dataclass_fields__[option].metadata["help"]
    assert present in help_text and absent not in help_text, (
        "TRL changed this help text: read the page's sentence on it again"
    )


# --- tests: nothing is left out --------------------------------------------------------------------------------------------------


def test_every_formula_has_a_test():
    compared = {loss_formula(loss_type) for loss_type in LOSS_TYPES} | set(DIVERGENCES.values())
    displayed = {found.name for path in GUIDES.glob("*.md") for found in formulas(path)}
    assert displayed, "no formulas found"
    guides_with_tests = [p for p in GUIDES.glob("*.md") if formulas(p) and (TESTS / f"test_guide_{p.stem}.py").exists()]
    elsewhere = {name for p in guides_with_tests for name in importlib.import_module(f"test_guide_{p.stem}").CHECKED}
    assert displayed - compared - set(CHECKED) - elsewhere == set(), (
        "add a test marked @checks(name) that computes the formula"
    )
    assert set(CHECKED) - displayed == set(), "a test checks a formula that no page displays"


@pytest.mark.parametrize("path", sorted(GUIDES.glob("*.md")), ids=lambda path: path.stem)
def test_every_symbol_is_in_the_table_of_symbols(path):
    pages = [page for page in (GUIDES / "notation.md", path) if "\n| symbol |" in page.read_text("utf-8")]
    table = {s for page in pages for row in table_rows(page, "symbol") for s in math_symbols(row["symbol"])}
    used = {}
    for line, latex in [*markdown_pages.inline_math(path), *((f.fence.line, f.latex) for f in formulas(path))]:
        for symbol in symbols(latex):
            used.setdefault(symbol, line)
    missing = {symbol: f"{path.name}:{line}" for symbol, line in used.items() if symbol not in table}
    assert not missing, "add these symbols to the table in reference_guides/notation.md"


def math_symbols(cell):
    return {symbol for latex in cell.split("$")[1::2] for symbol in symbols(latex)}


def test_every_row_of_the_table_of_symbols_is_used():
    used, code = set(), ""
    for path in GUIDES.glob("*.md"):
        code += "".join(fence.text for fence in markdown_pages.fences(path) if fence.lang == "python")
        lines = path.read_text("utf-8").splitlines()
        for line, latex in markdown_pages.inline_math(path):
            if path.stem != "notation" or not lines[line - 1].startswith("| $"):
                used |= symbols(latex)
        for found in formulas(path):
            used |= symbols(found.latex)
    for row in table_rows(GUIDES / "notation.md", "symbol"):
        assert math_symbols(row["symbol"]) <= used, "the table of symbols has a symbol that no formula uses"
        for name in re.findall(r"`([^`]+)`", row["name in the code"]):
            start = r"\b" if name[0].isalnum() else ""
            assert re.search(start + re.escape(name), code), f"no block uses the name {name!r}"


@pytest.mark.parametrize("path", sorted(GUIDES.glob("*.md")), ids=lambda path: path.stem)
def test_formulas_are_written_so_that_git_hosts_and_katex_both_render_them(path):
    assert "$$" not in path.read_text("utf-8"), "use a ```math fence for a displayed formula"
    for line, latex in markdown_pages.inline_math(path):
        assert not re.search(r"\\[^A-Za-z]", latex), f"{path.name}:{line}: Git hosts drop the backslash of `{latex}`"
    for line, latex in [*markdown_pages.inline_math(path), *((f.fence.line, f.latex) for f in formulas(path))]:
        assert r"\operatorname" not in latex, f"{path.name}:{line}: Git hosts refuse \\operatorname, use \\mathrm"
        assert latex.count("{") == latex.count("}"), f"{path.name}:{line}: unbalanced braces"
