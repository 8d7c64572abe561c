"""The formulas of reference_guides/distillation.md against TRL's own divergence and loss, and against exact sums.

The same random logits go to the functions of the guide and to the methods of a real GKDTrainer (and to the divergence of
DistillationTrainer): value and gradient to 1e-5 (relative, float32). What TRL does not have is compared with a sum over
every answer that can be written, or with autograd. `pytest -s` prints the largest error.
"""

import contextlib
import functools
import inspect
import itertools
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from markdown_pages import GUIDES, ROOT, fences, formulas, inline_math, symbols
from torch.distributions import Categorical, kl_divergence
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from trl import DistillationConfig, GRPOConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer, gkd_trainer
from trl.experimental.utils import DataCollatorForChatML
from trl.trainer import distillation_trainer, sft_trainer
from walkthrough_tools import batch_of, checked_formulas, comparisons, config, make_trainer, noting, page_of, tokenizer

PAGE = GUIDES / "distillation.md"
WALKTHROUGH = ROOT / "annotated_trainers" / "gkd.md"
JSD = GKDTrainer.generalized_jsd_loss
BETAS = (0.0, 0.1, 0.5, 0.8, 1.0)
SEEDS = (0, 1, 2)
ERRORS, agree = comparisons()[:2]


page = page_of(PAGE)


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    print(f"\n{len(CHECKED)} formulas, {len(ERRORS)} comparisons with TRL, largest error {max(ERRORS, default=0):.1e}")


CALLED, CHECKED, checks = checked_formulas()
functions = noting(CALLED)


def close(ours, theirs, rel=1e-9) -> None:
    """For exact computations in float64."""
    ours, theirs = torch.as_tensor(ours).detach(), torch.as_tensor(theirs).detach()
    assert float((ours - theirs).abs().max()) <= rel * max(float(theirs.abs().max()), 1e-3)


def gradient(value, *leaves):
    return torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)


def logits_of(seed, *shape, dtype=torch.float32, spread=3.0):
    """Random logits of the student (with gradient) and of the teacher."""
    dice = torch.Generator().manual_seed(seed)
    ours, theirs = (spread * torch.randn(shape or (3, 7, 11), generator=dice, dtype=dtype) for _ in range(2))
    return ours.requires_grad_(), theirs


def each(ours, theirs, beta, **more):
    """TRL's divergence at each place."""
    return JSD(ours, theirs, beta=beta, reduction="none", **more).sum(-1)


def row(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [row("1+2", "1+2=3 #3"), row("7+12", "7+12=19 #19")]


def tiny(seed: int, **more) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, **more)))


def sure(seed: int, **more) -> Qwen3ForCausalLM:
    """A teacher that is surer of its tokens than a random model."""
    model = tiny(seed, **more)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def make(folder, **more) -> GKDTrainer:
    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "max_new_tokens": 30, "lmbda": 1.0, "beta": 0.5}
    models = {"model": tiny(0), "teacher_model": sure(1)}
    return make_trainer(GKDTrainer, GKDConfig, folder, ROWS, **{**models, **settings, **more})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return make(tmp_path_factory.mktemp("run"))


@pytest.fixture
def trainer(built):
    """The trainer with its settings as they were."""
    saved = dict(vars(built))
    yield built
    vars(built).clear()
    vars(built).update(saved)


def trl_loss(trainer, ours, theirs, labels, n=None, beta=0.5):
    """What `compute_loss` gives when its two models return these logits."""
    trainer.beta, trainer.teacher_model = beta, torch.nn.Module()
    trainer.teacher_model.forward = lambda **_: SimpleNamespace(logits=theirs)
    batch = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
    return trainer.compute_loss(lambda **_: SimpleNamespace(logits=ours), batch, num_items_in_batch=n)


def labels_of(seed, rows=3, length=7, words=11):
    dice = torch.Generator().manual_seed(50 + seed)
    labels = torch.randint(0, words, (rows, length), generator=dice)
    for i in range(rows):
        labels[i, : int(torch.randint(1, length - 1, (1,), generator=dice))] = -100
    return labels


# ------------------------------------------------------------------------------------------------ the divergences, against TRL


@checks("forward-kl", "reverse-kl", "generalized-jsd")
def test_the_divergences_are_what_trl_computes(functions):
    for seed, beta in itertools.product(SEEDS, BETAS):
        ours, theirs = logits_of(seed)
        named = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta)
        found = [functions["generalized_jsd"](ours, theirs, beta), *([functions[named](ours, theirs)] if named else [])]
        for mine in found:
            trls = each(ours, theirs, beta)
            agree(mine, trls)
            agree(*gradient(mine.sum(), ours), *gradient(trls.sum(), ours))


@checks("forward-slope", "reverse-slope", "gkd-slope")
def test_the_slopes_are_what_trl_has(functions):
    for seed, beta in itertools.product(SEEDS, BETAS):
        ours, theirs = logits_of(seed)
        (trls,) = gradient(each(ours, theirs, beta).sum(), ours)
        if 0 < beta < 1:
            agree(functions["gkd_slope"](ours, theirs, beta), trls)
        else:
            agree(functions["reverse_slope" if beta else "forward_slope"](ours, theirs), trls)


@checks("jsd-swap", "jsd-entropies")
def test_swapped_models_and_entropies_give_the_same_number(functions):
    for seed, beta in itertools.product(SEEDS, BETAS):
        ours, theirs = logits_of(seed, dtype=torch.double)
        trls = each(ours, theirs, beta)
        close(functions["jsd_swap"](ours, theirs, beta), trls)
        if 0 < beta < 1:
            close(functions["jsd_entropies"](ours, theirs, beta), trls, rel=1e-8)
        same = torch.allclose(each(theirs, ours, beta), trls)
        assert same is (beta == 0.5)  # symmetric there alone


@checks("jsd-bound")
def test_the_bound_is_reached_by_models_that_share_no_token_and_never_passed(functions):
    apart = torch.tensor([0.0, -90.0]).double(), torch.tensor([-90.0, 0.0]).double()
    for beta in (0.01, 0.1, 0.5, 0.9):
        bound = functions["jsd_bound"](beta)
        assert float(each(*apart, beta)) == pytest.approx(bound, rel=1e-5)
        assert bound <= math.log(2) + 1e-12
        for seed in SEEDS:
            found = each(*logits_of(seed, dtype=torch.double, spread=9.0), beta)
            assert float(found.detach().min()) > -1e-12 and float(found.detach().max()) < bound
    assert functions["jsd_bound"](0.5) == pytest.approx(math.log(2))
    assert float(each(*apart, 0.0)) > 89 and float(each(*apart, 1.0)) > 89  # no bound at the ends


@checks("jsd-near-the-ends")
def test_near_the_ends_the_quotients_are_kl_divergences_and_the_loss_jumps(functions):
    for seed in SEEDS:
        ours, theirs = logits_of(seed, dtype=torch.double, spread=1.0)
        forward, reverse = each(ours, theirs, 0.0), each(ours, theirs, 1.0)
        close(functions["jsd_near_the_ends"](ours, theirs, 1e-6)[0], forward, rel=1e-4)
        close(functions["jsd_near_the_ends"](ours, theirs, 1 - 1e-6)[1], reverse, rel=1e-4)
        for end, near, beta in ((forward, 1e-6, 0.01), (reverse, 1 - 1e-6, 0.99)):
            assert float(each(ours, theirs, near).detach().max()) < 1e-4  # the limit is 0
            assert 70 < float(end.sum() / each(ours, theirs, beta).sum()) < 150  # and TRL's value is not


@checks("jsd-near-agreement")
def test_near_agreement_all_of_them_are_one_sum_of_squares(functions):
    for seed, beta in itertools.product(SEEDS, BETAS):
        noise, theirs = logits_of(seed, dtype=torch.double, spread=1.0)
        ours = (theirs + 1e-3 * noise.detach()).requires_grad_()
        ratio = functions["jsd_near_agreement"](ours, theirs, beta) / each(ours, theirs, beta)
        close(ratio, torch.ones_like(ratio), rel=1e-2)
        factor = gradient(each(ours, theirs, beta).sum(), ours)[0].norm()
        whole = gradient(each(ours, theirs, 0.0).sum(), ours)[0].norm()
        assert float(factor / whole) == pytest.approx(beta * (1 - beta) if 0 < beta < 1 else 1, rel=1e-2)


@checks("student-at-a-temperature", "tempered-slope", "high-temperature-slope")
def test_the_temperature_divides_logits_and_nothing_makes_up_for_it(functions):
    for seed, temperature in itertools.product(SEEDS, (0.5, 1.0, 2.0, 5.0)):
        ours, theirs = logits_of(seed)
        agree(functions["student_at_a_temperature"](ours, temperature), Categorical(logits=ours / temperature).probs)
        slope = functions["tempered_slope"](ours, theirs, temperature)
        agree(slope, *gradient(each(ours, theirs, 0.0, temperature=temperature).sum(), ours))
        agree(slope.reshape(-1, 11), chunked_slope(ours, theirs, temperature))
    ours, theirs = logits_of(0, dtype=torch.double)
    for temperature, error in ((100.0, 0.2), (1e4, 2e-3)):
        (trls,) = gradient(each(ours, theirs, 0.0, temperature=temperature).sum(), ours)
        close(functions["high_temperature_slope"](ours, theirs, temperature) * 1e4, trls * 1e4, rel=error)


def chunked_slope(ours, theirs, temperature):
    """The gradient of DistillationTrainer's divergence, whose hidden states are our logits."""
    hidden, theirs = ours.detach().reshape(-1, 11).requires_grad_(), theirs.reshape(-1, 11)
    head, mask = torch.eye(11), torch.ones(len(hidden))
    loss, *_ = chunked(hidden[None], theirs[None], head, head, mask[None], temperature=temperature)
    return gradient(loss * len(hidden), hidden)[0]


def chunked(*tensors, beta=0.0, **more):
    compute = distillation_trainer._chunked_divergence_loss
    if "chunk_size" in inspect.signature(compute).parameters:
        more["chunk_size"] = 8
    return compute(*tensors, beta=beta, **more)


# ------------------------------------------------------------------------------------------------------ the loss, against TRL


@checks("gkd-loss")
def test_the_loss_is_what_trl_computes(functions, trainer):
    for seed, beta, n in itertools.product(SEEDS, BETAS, (None, 17)):
        (ours, theirs), labels = logits_of(seed), labels_of(seed)
        mine = functions["gkd_loss"](ours, theirs, labels, beta, n)
        trls = trl_loss(trainer, ours, theirs, labels, n, beta)
        agree(mine, trls)
        agree(*gradient(mine, ours), *gradient(trls, ours))


def test_the_mean_is_one_over_tokens_and_not_over_answers(trainer):
    (ours, theirs), labels = logits_of(0), labels_of(0)
    places, mask = each(ours, theirs, 0.5)[:, :-1], labels[:, 1:] != -100
    by_answer = torch.stack([one[m].mean() for one, m in zip(places, mask, strict=True)]).mean()
    found = float(trl_loss(trainer, ours, theirs, labels).detach())
    assert found == pytest.approx(float(places[mask].mean()), rel=1e-5)
    assert found != pytest.approx(float(by_answer), rel=1e-2)


@checks("weight-of-own-answers")
def test_own_answers_have_the_weight_of_their_tokens(functions, trainer):
    """The same divergence at each token; own answers and the data's are divided by the data's count."""
    for lmbda, own, given in itertools.product((0.2, 0.5), (4, 12), (3, 6)):
        sums = {}
        for kind, tokens in (("own", own), ("given", given)):
            labels = torch.full((1, tokens + 1), 2)
            labels[0, 0] = -100
            z, z_t = torch.zeros(1, tokens + 1, 5), torch.arange(5.0).expand(1, tokens + 1, 5)
            sums[kind] = float(trl_loss(trainer, z, z_t, labels, n=given))
        own_part, given_part = lmbda * sums["own"], (1 - lmbda) * sums["given"]
        agree(functions["weight_of_own_answers"](lmbda, own, given), own_part / (own_part + given_part))
        (one,) = {round(float(each(torch.zeros(5), torch.arange(5.0), 0.5)), 6)}
        size = (lmbda * own + (1 - lmbda) * given) / given
        assert own_part + given_part == pytest.approx(size * one, rel=1e-4)


def test_sampled_answers_are_divided_by_what_was_counted_before(trainer):
    seen, compute = [], trainer.compute_loss

    def spy(model, inputs, return_outputs=False, num_items_in_batch=None):
        seen.append((int(num_items_in_batch), int((inputs["labels"] != -100).sum())))
        return compute(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    trainer.compute_loss = spy
    trainer.train()
    ((counted, sampled),) = seen
    assert counted == len("1+2=3 #3.7+12=19 #19.") != sampled
    # the other trainer counts behind its sampling
    source = inspect.getsource(distillation_trainer.DistillationTrainer._generate_and_score_completions)
    assert source.index("self._generate(") < source.index("loss_mask.sum()")
    assert re.search(r"num_items_in_batch = .*loss_mask\.sum\(\)", source)


def test_prompt_and_padding_have_no_label_and_the_end_has_one(trainer):
    batch = batch_of(trainer, range(2))
    spelled = [tokenizer().decode([i for i in labels if i != -100]) for labels in batch["labels"].tolist()]
    assert spelled == ["1+2=3 #3<|end|>", "7+12=19 #19<|end|>"]
    assert (batch["attention_mask"][0, :2] == 0).all()  # padding stands on the left
    assert isinstance(trainer.data_collator, DataCollatorForChatML)
    batch = {"prompts": torch.tensor([[0, 4]]), "prompt_attention_mask": torch.tensor([[0, 1]])}
    answer = torch.tensor([[0, 4, 7, 1, 0, 0]])
    writer = SimpleNamespace(generate=lambda **_: SimpleNamespace(sequences=answer))
    _, _, labels = GKDTrainer.generate_on_policy_outputs(writer, batch, GenerationConfig(eos_token_id=1))
    assert labels.tolist() == [[-100, -100, 7, 1, -100, -100]]


# --------------------------------------------------------------------------------------------------- who writes, against TRL


@pytest.fixture
def steps(trainer, monkeypatch):
    """One call is one micro-batch; nothing is sampled: an "answer" is the name of the model that would have written it."""
    monkeypatch.setattr(
        gkd_trainer, "unwrap_model_for_generation", lambda model, *_, **__: contextlib.nullcontext(model)
    )
    monkeypatch.setattr(SFTTrainer, "training_step", lambda _, model, inputs, n=None: inputs["labels"])

    def write(model, inputs, settings):
        assert settings is trainer.generation_config
        return None, None, "student" if model is trainer.model else "teacher"

    trainer.generate_on_policy_outputs = write
    return lambda: trainer.training_step(trainer.model, {"labels": "data"})


@checks("own-share-deviation")
def test_a_micro_batch_is_all_own_or_all_given_and_the_share_scatters(functions, trainer, steps):
    random.seed(0)
    for lmbda, accumulation in ((0.5, 4), (0.2, 16), (0.5, 1)):
        exact = mean = 0.0
        for own in range(accumulation + 1):
            chance = math.comb(accumulation, own) * lmbda**own * (1 - lmbda) ** (accumulation - own)
            exact += chance * (own / accumulation) ** 2
            mean += chance * own / accumulation
        assert mean == pytest.approx(lmbda)
        deviation = functions["own_share_deviation"](lmbda, accumulation)
        assert deviation == pytest.approx(math.sqrt(exact - mean**2))
        trainer.lmbda, trainer.seq_kd = lmbda, False
        shares = torch.tensor(
            [[float(steps() == "student") for _ in range(accumulation)] for _ in range(3000)], dtype=torch.double
        ).mean(1)
        assert float(shares.mean()) == pytest.approx(lmbda, abs=4 * deviation / math.sqrt(3000))
        assert float(shares.std()) == pytest.approx(deviation, rel=0.06)


def test_the_table_of_methods_is_what_the_options_do(trainer, steps):
    writers = {}
    for trainer.lmbda, trainer.seq_kd in itertools.product((0.0, 0.5, 1.0), (False, True)):
        writers[trainer.lmbda, trainer.seq_kd] = {steps() for _ in range(40)}
    assert writers == {
        (0.0, False): {"data"},
        (0.0, True): {"teacher"},
        (0.5, False): {"data", "student"},
        (0.5, True): {"teacher", "student"},
        (1.0, False): {"student"},
        (1.0, True): {"student"},
    }
    text = PAGE.read_text("utf-8")
    for options in ("`lmbda=0.0`, `beta=0.0`", "`lmbda=0.0`, `seq_kd=True`", "`lmbda=1.0`, `beta=1.0`"):
        assert options in text


def test_seq_kd_is_the_divergence_and_not_the_cross_entropy(trainer, monkeypatch, page):
    monkeypatch.setattr(
        gkd_trainer, "unwrap_model_for_generation", lambda model, *_, **__: contextlib.nullcontext(model)
    )
    monkeypatch.setattr(
        SFTTrainer, "training_step", lambda self, model, inputs, n=None: self.compute_loss(model, inputs)
    )
    trainer.lmbda, trainer.seq_kd = 0.0, True
    trainer.model.eval()
    batch = batch_of(trainer, range(2))
    found = trainer.training_step(trainer.model, batch)  # replaces the answers in the batch by the teacher's
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for model in (trainer.model, trainer.teacher_model)
        )
    agree(page["gkd_loss"](ours, theirs, batch["labels"]), found)
    cross_entropy = torch.nn.functional.cross_entropy(ours[:, :-1].transpose(1, 2), batch["labels"][:, 1:])
    assert float(cross_entropy) > 2 * math.log(2) > float(found.detach()) > 0.01


def test_the_temperature_of_the_config_is_that_of_the_sampling(trainer):
    assert trainer.generation_config.temperature == trainer.args.temperature == 0.9
    trainer.model.eval()
    batch, losses = batch_of(trainer, range(2)), []
    for value in (0.9, 5.0):
        trainer.temperature = trainer.args.temperature = trainer.generation_config.temperature = value
        losses.append(float(trainer.compute_loss(trainer.model, batch).detach()))
    trainer.args.temperature = trainer.generation_config.temperature = 0.9
    assert losses[0] == losses[1]


def test_vocabularies_of_another_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size"):
        make(tmp_path, teacher_model=tiny(1, vocab_size=len(tokenizer()) + 3))


@checks("cut-vocabulary")
def test_cutting_rows_off_the_teacher_divides_by_what_is_left(functions):
    wide = tiny(1, vocab_size=len(tokenizer()) + 3)
    ids = torch.randint(4, len(tokenizer()), (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = wide(input_ids=ids).logits
        wide.resize_token_embeddings(len(tokenizer()))
        after = wide(input_ids=ids).logits
    cut = functions["cut_vocabulary"](before, len(tokenizer()))
    agree(cut, after.softmax(-1))
    ours = torch.randn(after.shape, generator=torch.Generator().manual_seed(1))
    for beta in BETAS:
        agree(each(ours, cut.log(), beta), each(ours, after, beta))


@checks("jsd-bytes")
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_backward_pass_keeps_as_many_bytes_as_the_formula_says(functions, trainer, beta):
    rows, length, words = 2, 41, 500
    ours, theirs = logits_of(0, rows, length, words)
    sizes = []
    for learned in (40, 3):  # what is masked costs the same
        labels = torch.full((rows, length), -100)
        labels[:, -learned:] = 2
        kept = {}

        def remember(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            loss = trl_loss(trainer, ours, theirs, labels, beta=beta)
        sizes.append(sum(kept.values()))
        assert sizes[-1] == pytest.approx(functions["jsd_bytes"](rows, length, words, beta), rel=5e-3)
        del loss
    assert sizes[0] == sizes[1]


# ------------------------------------------------------------------------------------------------- whole answers, exact sums


@pytest.fixture(params=SEEDS)
def answers(request):
    """Logits of the first of two tokens, and of the second after each first: of the student (with gradient), the teacher."""
    dice = torch.Generator().manual_seed(200 + request.param)

    def model():
        return torch.randn(4, generator=dice, dtype=torch.double), torch.randn(4, 4, generator=dice, dtype=torch.double)

    student, teacher = model(), model()
    return [z.requires_grad_() for z in student], teacher


def all_answers(first, second):
    """The distribution of whole answers, counted out."""
    pairs = itertools.product(range(4), repeat=2)
    logps = [Categorical(logits=first).logits[a] + Categorical(logits=second[a]).logits[b] for a, b in pairs]
    return Categorical(logits=torch.stack(logps))


@checks("sequence-forward-kl", "kl-chain-rule")
def test_the_divergence_of_answers_is_that_of_their_tokens_and_of_sft(answers, functions):
    student, teacher = answers
    exact = kl_divergence(all_answers(*teacher), all_answers(*student))
    chances = Categorical(logits=teacher[0]).probs
    by_trl = each(student[0], teacher[0], 0.0) + chances @ each(student[1], teacher[1], 0.0)
    mine = functions["kl_chain_rule"](student, teacher)
    close(mine, exact)
    agree(mine, by_trl)
    of_answers = functions["sequence_forward_kl"](student, teacher)
    close(of_answers, exact)
    sft = -(all_answers(*teacher).probs * all_answers(*student).logits).sum()  # the mean of SFT's loss
    for z in range(2):
        for value in (mine, of_answers, sft):
            close(gradient(value, *student)[z], gradient(exact, *student)[z])
    close(of_answers, sft - all_answers(*teacher).entropy())


@checks("whole-answer-gradient")
def test_the_gradient_of_whole_answers_has_a_part_that_gkd_leaves_out(answers, functions):
    student, teacher = answers
    exact = gradient(kl_divergence(all_answers(*student), all_answers(*teacher)), *student)
    first, through_choice = functions["whole_answer_gradient"]([z.detach() for z in student], teacher)
    close(first + through_choice, exact[0])
    chances = Categorical(logits=student[0]).probs.detach()  # token ids carry no gradient
    gkd = each(student[0], teacher[0], 1.0) + chances @ each(student[1], teacher[1], 1.0)
    agree(first, gradient(gkd, *student)[0])
    agree(exact[1], gradient(gkd, *student)[1])  # nothing comes after the last token
    assert float(through_choice.norm()) > 0.02 * float(exact[0].norm())
    # the value of that pair is a divergence of answers, that of the pair with the forward KL is none
    other = each(student[0], teacher[0], 0.0) + chances @ each(student[1], teacher[1], 0.0)
    wholes = [kl_divergence(all_answers(*a), all_answers(*b)) for a, b in ((student, teacher), (teacher, student))]
    close(gkd, wholes[0])
    assert all(abs(float((other - whole).detach())) > 1e-3 for whole in wholes)


@checks("reverse-kl-from-samples", "forward-kl-from-samples")
def test_pushes_of_samples_are_those_of_the_estimators_and_their_mean_is_trls_gradient(functions):
    for seed in SEEDS:
        ours, theirs = logits_of(seed, 9, dtype=torch.double, spread=1.0)
        logps, log_t = ours.log_softmax(-1), theirs.log_softmax(-1)
        ratio, log_ratio = (logps - logps.detach()).exp(), logps - log_t
        k3 = (-log_ratio).exp() + log_ratio - 1
        reverse, forward = (functions[f"{name}_kl_from_samples"](ours, theirs) for name in ("reverse", "forward"))

        def samples(values, ours=ours):
            return torch.stack([gradient(one, ours)[0] for one in values])

        for values in (log_ratio.detach() * logps, log_ratio**2 / 2, ratio * k3):
            close(samples(values), reverse)
        close(samples(k3), forward)
        for each_push, beta in ((reverse, 1.0), (forward, 0.0)):
            close(ours.softmax(-1) @ each_push, *gradient(each(ours, theirs, beta), ours))
    assert GRPOConfig.__dataclass_fields__["use_bias_correction_kl"].default is True
    assert GRPOConfig.__dataclass_fields__["beta"].default == 0.0


# ------------------------------------------------------------------------------------------------------ the world of two tokens


def written(chain, length):
    """Every answer: (what stands before each token, probability)."""
    for tokens in itertools.product(range(len(chain)), repeat=length):
        before = [0, *tokens[:-1]]
        yield before, math.prod(float(chain[a, b]) for a, b in zip(before, tokens, strict=True)), tokens


@checks("state-visits", "compounding-slips")
def test_visits_and_lost_tokens_are_those_of_all_answers_counted_out(functions, page):
    for chain in (page["by_teacher"], page["at_first"], torch.tensor([[0.7, 0.3], [0.0, 1.0]], dtype=torch.double)):
        visits, lost = torch.zeros(2, dtype=torch.double), 0.0
        for before, chance, tokens in written(chain, 5):
            lost += chance * sum(tokens)
            for place in before:
                visits[place] += chance
        close(functions["state_visits"](chain, 5), visits)
    assert functions["compounding_slips"](0.3, 5) == pytest.approx(lost)  # the last one has no way back
    for slip, length in ((1e-4, 50), (1e-5, 300)):
        assert functions["compounding_slips"](slip, length) == pytest.approx(slip * length**2 / 2, rel=0.03)


@checks("mixed-answers-loss")
def test_the_loss_of_mixed_answers_is_that_of_all_answers_counted_out(functions, page):
    given = page["by_teacher"]
    for seed, lmbda, beta in itertools.product(SEEDS, (0.0, 0.3, 1.0), (0.0, 0.5, 1.0)):
        z = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.double).requires_grad_()
        places, exact = each(z, given.log(), beta), 0.0
        for share, chain in ((lmbda, z.detach().softmax(-1)), (1 - lmbda, given)):
            for before, chance, _ in written(chain, 4):
                exact = exact + share * chance * places[before].mean()
        mine = functions["mixed_answers_loss"](z, given, 4, lmbda, beta)
        agree(mine, exact)
        agree(*gradient(mine, z), *gradient(exact, z))


def test_what_the_page_says_of_the_world(page):
    world, given = {}, page["by_teacher"]
    for lmbda in (0, 0.5, 1):
        z = page["trained"](lmbda)
        on_given, on_own = (float(page["mixed_answers_loss"](z, given, 20, share, beta=0)) for share in (0, 1))
        world[lmbda] = SimpleNamespace(z=z, given=on_given, own=on_own, slips=page["slips"](z.softmax(-1)))
    at_first = float(page["mixed_answers_loss"](page["at_first"].log(), given, 20, 0, beta=0))
    assert at_first / world[0].given == pytest.approx(8, rel=0.1)  # "an eighth"
    after_a_slip = page["state_visits"](given, 20)[1] / 20 * page["forward_kl"](world[0].z, given.log())[1]
    assert float(after_a_slip) > 0.95 * world[0].given  # "nearly all that is left of it"
    assert 3 < world[0].own / world[0].given < 4
    assert all(world[0].slips > 2 * world[lmbda].slips for lmbda in (0.5, 1))
    gain = (world[0].slips - world[0.5].slips) / (world[0].slips - world[1].slips)
    assert gain > 0.8  # "half of the answers already do most of the work"
    shares = {
        (beta, rate, lmbda): page["slips"](page["trained"](lmbda, beta, rate=rate).softmax(-1))
        for beta, rate in ((0, 2.0), (0.5, 2.0), (0.5, 8.0), (1, 2.0))
        for lmbda in (0, 0.5, 1)
    }
    assert all(shares[b, r, 0] > 1.9 * shares[b, r, 0.5] > shares[b, r, 1] for b, r, _ in shares)
    assert all(shares[0.5, 2.0, lmbda] > 2.5 * shares[0, 2.0, lmbda] for lmbda in (0, 0.5, 1))
    assert all(shares[0.5, 8.0, lmbda] == pytest.approx(shares[0, 2.0, lmbda], rel=0.26) for lmbda in (0, 0.5, 1))
    right = [float(one.z.softmax(-1)[0, 0]) for one in world.values()]
    assert max(right) - min(right) < 0.001  # "after a right token all three learn alike"
    assert float(page["state_visits"](given, 20)[1]) == pytest.approx(0.2, abs=0.05)
    assert 0.5**9 == 1 / 512


# ------------------------------------------------------------------------------------------------ a student that is too small


def test_the_best_hump_at_the_forward_kl_has_the_mean_and_the_deviation_of_the_teacher(page):
    places, teacher = page["places"], page["two_humps"]
    weights = torch.tensor([9.0, math.log(4.0)], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-11)

    def closure():
        optimizer.zero_grad()
        loss = JSD(page["hump"](weights[0], weights[1].exp()), teacher, beta=0, reduction="sum")
        loss.backward()
        return loss

    optimizer.step(closure)
    best = page["hump"](weights[0], weights[1].exp()).detach()
    for power in (1, 2):
        close(best.exp() @ places**power, teacher.exp() @ places**power, rel=1e-5)
    of_grid = page["best_student"](page["forward_kl"])
    assert 0 <= float(each(of_grid, teacher, 0.0) - each(best, teacher, 0.0)) < 1e-3


def test_covering_and_seeking_as_the_page_says(page):
    teacher, gap = page["two_humps"], slice(9, 12)
    forward, reverse = (page["best_student"](page[name]) for name in ("forward_kl", "reverse_kl"))
    assert 0.25 < float(forward.exp()[gap].sum()) < 0.28 and float(teacher.exp()[gap].sum()) < 0.01
    assert float(reverse.exp()[:9].sum()) > 0.99
    assert float(teacher.exp()[12:].sum()) == pytest.approx(0.4, abs=0.005)
    deviations = {}
    for beta in torch.linspace(0.3, 0.5, 21).tolist():
        p = page["best_student"](functools.partial(page["generalized_jsd"], beta=beta)).exp()
        deviations[beta] = float((p @ (page["places"] - p @ page["places"]) ** 2).sqrt())
    assert all(one > 3.5 or one < 1.1 for one in deviations.values())  # "no beta gives something in between"
    steps = [a > 3.5 > b for a, b in itertools.pairwise(deviations.values())]
    assert sum(steps) == 1 and deviations[min(deviations)] > 3.5 > 1.1 > deviations[max(deviations)]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_that_can_be_anything_ends_at_the_teacher(page, beta):
    teacher = page["two_humps"]
    z = torch.zeros(21, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = each(z, teacher, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float((z.softmax(-1) - teacher.exp()).abs().max()) < 1e-4


# ------------------------------------------------------------------------------------------------------ numbers of the text


def test_numbers_of_the_text(page):
    text = " ".join(PAGE.read_text("utf-8").split())
    for sentence, value in (
        (r"= 1/2 \cdot \log 3 = 0.549$", math.log(3) / 2),
        (r"+ 1/4 \cdot \log 0.5 = 0.131$", 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        (r"$1 - 0.99^2 = 0.0199$", 1 - 0.99**2),
        ("together 0.0299", page["compounding_slips"](0.01, 2)),
        ("and 0.09 of it at", 0.1 * 0.9),
        (r"$0.48 / 0.95 = 0.505$", 0.48 / (0.48 + 0.32 + 0.15)),
    ):
        assert sentence in text, sentence
        number = re.findall(r"\d+\.\d+", sentence)[-1]
        assert value == pytest.approx(float(number), abs=0.5001 * 10 ** -len(number.split(".")[1])), sentence
    terms = 0.75 * math.log(75), 0.25 * math.log(0.25 / 0.99), 0.99 * math.log(3.96), 0.01 * math.log(0.01 / 0.75)
    assert (terms[0], terms[2]) == pytest.approx((0.75 * math.log(0.75 / 0.01), 0.99 * math.log(0.99 / 0.25)))
    assert abs(terms[0]) > 5 * abs(terms[1]) and abs(terms[2]) > 5 * abs(terms[3])


def test_defaults_are_those_of_trl(page):
    def default(kind, name):
        return kind.__dataclass_fields__[name].default

    for name, value in (("lmbda", 0.5), ("beta", 0.5), ("temperature", 0.9), ("seq_kd", False)):
        assert default(GKDConfig, name) == value
    for name in ("generalized_jsd", "gkd_loss", "gkd_slope"):
        assert inspect.signature(page[name]).parameters["beta"].default == default(GKDConfig, "beta")
    assert (default(DistillationConfig, "beta"), default(DistillationConfig, "temperature")) == (1.0, 1.0)
    assert distillation_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE == sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE == 256


def test_a_factor_of_the_loss_is_hardly_seen_by_adam_and_by_the_clip_it_is(page):
    z, base = (page["base"] + 0.1 * page["noise"]).detach(), page["base"]
    ends = {}
    for name, factor, limit in (
        ("adam", 1.0, None),
        ("adam, less", 0.25, None),
        ("sgd", 1.0, 1e-2),
        ("sgd, less", 0.25, 1e-2),
    ):
        weight = z.clone().requires_grad_()
        kind = torch.optim.Adam if "adam" in name else torch.optim.SGD
        optimizer = kind([weight], lr=0.01)
        (factor * page["forward_kl"](weight, base)).backward()
        norm = weight.grad.norm()
        if limit:
            torch.nn.utils.clip_grad_norm_([weight], limit)
            assert (float(weight.grad.norm()) < 0.99 * float(norm)) is (
                factor == 1.0
            )  # the larger one alone is clipped
        optimizer.step()
        ends[name] = weight.detach() - z
    close(ends["adam"], ends["adam, less"], rel=0.1)
    assert float(ends["sgd"].norm() / ends["sgd, less"].norm()) < 3.9


# ------------------------------------------------------------------------------------------------------ nothing is left out


def test_every_formula_has_a_test():
    assert {found.name for found in formulas(PAGE)} == set(CHECKED)


def test_formulas_and_functions_are_those_of_the_walkthrough():
    ours = {found.name: found for found in formulas(PAGE)}
    theirs = re.findall(
        r"<!-- formula: ([a-z0-9-]+) -->\n(?:<!--.*?-->\n)?```math\n(.*?)```", WALKTHROUGH.read_text("utf-8"), re.S
    )
    shared = {name: latex for name, latex in theirs if name in ours}
    assert set(shared) == {"generalized-jsd", "gkd-loss", "gkd-slope"}
    text = WALKTHROUGH.read_text("utf-8")
    for name, latex in shared.items():
        assert ours[name].latex.split() == latex.split(), name
        (body,) = re.findall(rf"^def {ours[name].function}\(.*?(?=^\S|\Z)", ours[name].block.text, re.M | re.S)
        assert body.strip() in text, f"the function of {name} differs from the one in gkd.md"


def table(first_header) -> list[dict]:
    lines = PAGE.read_text("utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first_header} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in rows]
    return [dict(zip(cells[0], one, strict=True)) for one in cells[2:]]


def math_symbols(cell):
    return {symbol for latex in cell.split("$")[1::2] for symbol in symbols(latex)}


def test_every_symbol_is_in_the_notation_or_in_the_table_of_this_page():
    own = table("symbol")
    notation = re.findall(r"^\| (\$.*?) \|", (GUIDES / "notation.md").read_text("utf-8"), re.M)
    known = {symbol for cell in [*notation, *(one["symbol"] for one in own)] for symbol in math_symbols(cell)}
    lines = PAGE.read_text("utf-8").splitlines()
    used = {symbol for found in formulas(PAGE) for symbol in symbols(found.latex)}
    for line, latex in inline_math(PAGE):
        if not lines[line - 1].startswith("| $"):
            used |= symbols(latex)
    assert used <= known, sorted(used - known)
    code = "".join(fence.text for fence in fences(PAGE) if fence.lang == "python")
    for one in own:
        assert math_symbols(one["symbol"]) <= used, one["symbol"]
        for name in re.findall(r"`([^`]+)`", one["name in the code"]):
            start = r"\b" if name[0].isalnum() else ""
            assert re.search(start + re.escape(name), code), f"no block uses the name {name!r}"
