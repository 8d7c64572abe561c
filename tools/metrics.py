"""The tables of reference_guides/metrics.md, for cog: every key that one of the fifteen trainers logs.

Which keys there are, who logs them and when to worry is read from the tables under "Logged metrics" of the walkthroughs,
each of which a test holds against a run. What is normal is read from annotated_examples/expected. What a key is stands
here once more, in words that do without the symbols of a page and without the row above: see GROUPS.

`python tools/metrics.py` prints the digests of the walkthroughs' tables, for READ.
"""

import hashlib
import re
import sys
from dataclasses import dataclass
from functools import cache

from tables import NAMES, ROOT, TRAINERS, measurement, number

COLUMNS = ["Key", "What it is", "The expression", "Worry when"]  # of a walkthrough; PPO's has a fifth
ONLINE = "online_dpo nash_md xpo"
PAIRS = "dpo orpo cpo"
OFFLINE = f"sft reward {PAIRS} kto bco gkd prm"

# Digests of the tables that GROUPS retells. When one does not fit any more, read that table again, correct what is
# said here, and take the new digest.
READ = {
    "sft": "6e1109f637dc",
    "reward": "4e3f4ca14303",
    "dpo": "cd930874e981",
    "kto": "d0acfc0de9d7",
    "orpo": "f1d93bbcc34d",
    "cpo": "3983bdc80537",
    "bco": "93947206ba29",
    "ppo": "dc9bfeec0e58",
    "grpo": "426788ebe1b6",
    "rloo": "bb490cfdd2de",
    "online_dpo": "4e2e9768f77a",
    "nash_md": "fc55f4be22ae",
    "gkd": "bd172f78af48",
    "xpo": "c98e7a8146a4",
    "prm": "d467a165f98f",
}


def trainers_of(text: str) -> list[str]:
    """The trainers of a string, in the order of this repository."""
    named = text.split()
    assert set(named) <= set(TRAINERS), text
    return [trainer for trainer in TRAINERS if trainer in named]


AS_IN_TRAINING = "as in training"


@dataclass(frozen=True)
class Meaning:
    """What a key is in some trainers. Their values lie between `low` and `high`; None is no limit."""

    trainers: str
    what: str
    unit: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def span(self) -> str:
        if self.low == self.high == 0:
            return "0"
        ends = {
            (True, True): f"{self.low} to {self.high}",
            (True, False): f"at least {self.low}",
            (False, True): f"at most {self.high}",
            (False, False): "either sign",
        }
        return ends[self.low is not None, self.high is not None]

    @property
    def range(self) -> str:
        """Unit and range as the page shows them."""
        if self.unit == AS_IN_TRAINING:
            return self.unit
        return "; ".join(part for part in (self.unit, self.span) if part)


def share(trainers: str, what: str) -> Meaning:
    return Meaning(trainers, what, "", 0, 1)


def signed(trainers: str, what: str, unit: str = "") -> Meaning:
    return Meaning(trainers, what, unit)


def positive(trainers: str, what: str, unit: str = "") -> Meaning:
    return Meaning(trainers, what, unit, 0)


def negative(trainers: str, what: str, unit: str = "") -> Meaning:
    return Meaning(trainers, what, unit, None, 0)


PER_TOKEN, PER_ANSWER, REWARD = "nats a token", "nats an answer", "in units of the reward"

GROUPS: dict[str, dict[str, list[Meaning]]] = {
    "Loss and optimizer": {
        "loss": [
            positive(
                "sft", "cross-entropy of the next token, mean over the learned tokens of an optimizer step", PER_TOKEN
            ),
            positive(
                "reward",
                "−log σ(score of chosen − score of rejected − `margin` column), plus the centering term if it is on",
            ),
            positive("dpo", "default type: −log σ(β × (log-ratio of chosen − log-ratio of rejected))"),
            positive("kto", "default type: weight of the row × (1 − σ(± β × (log-ratio − reference point)))"),
            positive("orpo", "cross-entropy of prompt and chosen answer, minus β × log σ(log odds ratio)"),
            positive(
                "cpo",
                "default type: −log σ(β × (log-probability of chosen − that of rejected)), plus `cpo_alpha` × `nll_loss`",
            ),
            positive("bco", "−log σ(± (reward − `delta`)), mean over rows; a bad row is weighted only with UDM"),
            signed(
                "grpo", "about 0 while a round feeds one step, **no measure of learning**: only its gradient counts"
            ),
            signed(
                "rloo",
                "0 while a round feeds one step, plus the router's term of a mixture of experts; **no measure of learning**",
            ),
            positive(
                "online_dpo",
                "default type: −log σ(β × (log-ratio of the better answer − log-ratio of the other)), to four digits",
            ),
            signed("nash_md", "a policy-gradient loss, to four digits: **no measure of learning**"),
            positive(
                "gkd", "generalized Jensen-Shannon divergence of student and teacher, mean over tokens", PER_TOKEN
            ),
            signed("xpo", "`loss/dpo` plus `loss/xpo`, to four digits"),
            positive(
                "prm", "cross-entropy of a step's label, **times** accumulation steps and processes", "nats a step"
            ),
        ],
        "loss/dpo": [positive("xpo", "−log σ(β × (log-ratio of the better answer − log-ratio of the other))")],
        "loss/xpo": [
            negative(
                "xpo", "`alpha` × the policy's log-probability of the **reference's** answer: the exploration term"
            )
        ],
        "loss/kl": [
            signed(
                "nash_md", "log-ratio of the policy's own answer to the reference: a KL estimate, no loss", PER_ANSWER
            )
        ],
        "loss/score": [signed("nash_md", "(probability to beat the opponent − ½) × log-probability of the answer")],
        "loss/policy_avg": [signed("ppo", "clipped policy loss, mean over the passes of the round", "advantages")],
        "loss/value_avg": [
            positive("ppo", "half of the squared error of the value model, before `vf_coef`", "squared scores")
        ],
        "policy_loss": [signed("grpo", "the loss without the entropy bonus; only with that bonus")],
        "nll_loss": [
            positive("orpo", "cross-entropy of **prompt and** chosen answer", PER_TOKEN),
            positive("cpo", "cross-entropy of the chosen answer **alone**; 0 if `cpo_alpha=0`", PER_TOKEN),
        ],
        "aux_loss": [
            positive(
                "sft dpo kto grpo rloo",
                "load balancing of a mixture-of-experts model, before its coefficient; missing otherwise",
            )
        ],
        "grad_norm": [
            positive(f"sft reward {PAIRS} kto bco grpo rloo gkd", "norm of the gradient before it is clipped"),
            positive(ONLINE, "norm of the gradient **summed** over micro-batches, before it is clipped"),
            positive("prm", "norm of the gradient before it is clipped, with the factor of `loss`"),
        ],
        "learning_rate": [positive(f"{OFFLINE} grpo rloo {ONLINE}", "learning rate of the last optimizer step")],
        "lr": [positive("ppo", "learning rate of this round: PPO's name for `learning_rate`")],
        "entropy_coef": [positive("grpo", "coefficient of the entropy bonus after the step; only with that bonus")],
    },
    "Rewards, margins and accuracies": {
        "reward": [
            signed("grpo", "weighted sum over the reward functions, mean over answers", REWARD),
            signed(
                "rloo",
                "weighted sum over the reward functions, mean over answers, **before** clip and KL penalty",
                REWARD,
            ),
        ],
        "reward_std": [
            positive("grpo rloo", "standard deviation of `reward` over the **whole round**, not in groups", REWARD)
        ],
        "frac_reward_zero_std": [
            share("grpo", "share of answers whose group has no variance in reward: they teach nothing"),
            share("rloo", "share of groups whose rewards **after** the KL penalty are all the same"),
        ],
        "rewards/NAME/mean": [
            signed("grpo rloo", "mean of the reward function NAME, without its weight, over the answers it judged")
        ],
        "rewards/NAME/std": [positive("grpo rloo", "standard deviation of that reward function over the round")],
        "rewards/chosen": [
            signed("dpo", "β × log-ratio of the chosen answer to the reference", "β × nats an answer"),
            signed("kto bco", "β × log-ratio of the **good rows** to the reference", "β × nats an answer"),
            negative(
                "orpo", "β × log-probability of the chosen answer per token: **no reference**", "β × nats a token"
            ),
            negative(
                "cpo",
                "β × log-probability of the chosen answer: **no reference**; per token for `simpo` and `ipo`, bent with `alpha`",
                "β × nats",
            ),
            signed(
                "online_dpo xpo",
                "β × log-ratio of the answer that was judged better: implied, not the judge's score",
                "β × nats an answer",
            ),
            signed(
                "nash_md", "**score of the reward model** for the policy's answer, with the penalty for a missing end"
            ),
        ],
        "rewards/rejected": [
            signed("dpo", "β × log-ratio of the rejected answer to the reference", "β × nats an answer"),
            signed("kto bco", "β × log-ratio of the **bad rows** to the reference", "β × nats an answer"),
            negative(
                "orpo", "β × log-probability of the rejected answer per token: **no reference**", "β × nats a token"
            ),
            negative(
                "cpo",
                "β × log-probability of the rejected answer: **no reference**; per token for `simpo` and `ipo`",
                "β × nats",
            ),
            signed(
                "online_dpo xpo",
                "β × log-ratio of the answer that was judged worse: implied, not the judge's score",
                "β × nats an answer",
            ),
            signed("nash_md", "**score of the reward model** for the opponent's answer, with the penalty"),
        ],
        "rewards/margins": [
            signed("dpo online_dpo xpo", "`rewards/chosen` − `rewards/rejected`, of pairs", "β × nats an answer"),
            signed(
                "kto bco",
                "`rewards/chosen` − `rewards/rejected`: good rows against bad ones, of **different** prompts",
                "β × nats an answer",
            ),
            signed(
                "orpo",
                "β × difference of the log-probabilities per token; neither odds nor reference",
                "β × nats a token",
            ),
            signed(
                "cpo",
                "β × difference of the log-probabilities: no reference; per token for `simpo` and `ipo`",
                "β × nats",
            ),
            signed(
                "nash_md",
                "log-ratio of **one** answer, the policy's, to the reference: the number of `loss/kl`",
                PER_ANSWER,
            ),
        ],
        "rewards/accuracies": [
            share("dpo", "share of pairs with a margin above 0: a **change** since the reference, 0.0 at step 1"),
            share("orpo", "share of pairs whose chosen answer is likelier per token: not a change"),
            share("cpo", "share of pairs whose chosen answer is the likelier one: not a change"),
            share(
                "online_dpo xpo", "share of pairs with an implied margin above 0; a pair of one answer twice is a miss"
            ),
            share(
                "nash_md", "share of the policy's answers that it likes better than the reference does: no reward in it"
            ),
        ],
        "rewards/probabilities": [
            share("nash_md", "probability that the policy's answer beats the opponent's, by the reward model")
        ],
        "accuracy": [share("reward", "share of pairs whose chosen answer has the higher score; a tie is a miss")],
        "margin": [
            signed("reward", "score of chosen − score of rejected; the `margin` column is not taken off", "scores")
        ],
        "mean_reward": [signed("reward", "mean score of chosen and rejected answers", "scores")],
        "min_reward": [signed("reward", "smallest score of a batch, mean over batches", "scores")],
        "max_reward": [signed("reward", "largest score of a batch, mean over batches", "scores")],
        "delta": [signed("bco", "the shift that a reward is compared with", "β × nats an answer")],
        "objective/scores": [
            signed("ppo", "mean score of the reward model, after the penalty for a missing end", "scores"),
            signed("online_dpo", "mean weighted reward of both answers, after the penalty for a missing end", "scores"),
        ],
        "objective/scores_margin": [
            positive("online_dpo", "reward of the better answer − reward of the other one", "scores"),
            signed("xpo", "`objective/model_scores` − `objective/ref_scores`: policy against reference", "scores"),
        ],
        "objective/model_scores": [signed("xpo", "mean score of the policy's answers, with the penalty", "scores")],
        "objective/ref_scores": [signed("xpo", "mean score of the reference's answers, with the penalty", "scores")],
        "objective/non_score_reward": [
            signed("ppo", "−`kl_coef` × `objective/kl`: what the policy pays for its distance", "scores"),
            signed("online_dpo", "−β × `objective/kl`, padding included; not part of any loss", "scores"),
        ],
        "objective/rlhf_reward": [
            signed("ppo", "`objective/scores` + `objective/non_score_reward`: what is maximized", "scores"),
            signed("online_dpo", "the same sum, padding included: what PPO would maximize; no loss uses it", "scores"),
        ],
    },
    "Likelihoods": {
        "logps/chosen": [
            negative("dpo", "log-probability of the chosen answer, a sum over its tokens", PER_ANSWER),
            negative("kto bco", "log-probability of the good rows' answers, a sum over tokens", PER_ANSWER),
            negative("orpo", "log-probability of the chosen answer, **mean over tokens**", PER_TOKEN),
            negative(
                "cpo",
                "log-probability of the chosen answer: a sum, but a **mean over tokens** for `simpo` and `ipo`",
                "nats an answer, or a token",
            ),
            negative(
                "online_dpo", "log-probability of the answer that was judged better, a sum over tokens", PER_ANSWER
            ),
            negative("nash_md", "log-probability of the policy's own answer, a sum over tokens", PER_ANSWER),
            negative(
                "xpo",
                "log-probability of the better answer under the policy **plus that under the reference**",
                PER_ANSWER,
            ),
        ],
        "logps/rejected": [
            negative("dpo", "log-probability of the rejected answer, a sum over its tokens", PER_ANSWER),
            negative("kto bco", "log-probability of the bad rows' answers, a sum over tokens", PER_ANSWER),
            negative("orpo", "log-probability of the rejected answer, **mean over tokens**", PER_TOKEN),
            negative(
                "cpo",
                "log-probability of the rejected answer: a sum, but a **mean over tokens** for `simpo` and `ipo`",
                "nats an answer, or a token",
            ),
            negative(
                "online_dpo", "log-probability of the answer that was judged worse, a sum over tokens", PER_ANSWER
            ),
            negative(
                "nash_md",
                "log-probability under the **reference** of the policy's answer: nothing is rejected",
                PER_ANSWER,
            ),
            negative(
                "xpo",
                "log-probability of the worse answer under the policy **plus that under the reference**",
                PER_ANSWER,
            ),
        ],
        "log_odds_ratio": [negative("orpo", "log σ of the log odds ratio: **not** that ratio itself")],
        "log_odds_chosen": [signed("orpo", "the log odds ratio of chosen against rejected, of **both** answers")],
        "mean_token_accuracy": [
            share("sft", "share of the learned tokens that are the model's first choice"),
            share("dpo", "share of the chosen answer's tokens that are the model's first choice"),
        ],
        "logits/chosen": [
            signed("dpo kto", "mean raw logit over the vocabulary, at the tokens of chosen (KTO: good) answers"),
            signed(
                "orpo cpo",
                "mean raw logit over the vocabulary and **all** places of the row, padding too (ORPO: not the last)",
            ),
            signed("bco", "**sum** of raw logits over the vocabulary and all places of a good row, padding too"),
        ],
        "logits/rejected": [
            signed("dpo kto", "mean raw logit over the vocabulary, at the tokens of rejected (KTO: bad) answers"),
            signed(
                "orpo cpo",
                "mean raw logit over the vocabulary and **all** places of the row, padding too (ORPO: not the last)",
            ),
            signed("bco", "**sum** of raw logits over the vocabulary and all places of a bad row, padding too"),
        ],
    },
    "KL, entropy and ratios": {
        "kl": [
            positive("kto", "the reference point: mean log-ratio of mismatched answers, cut at 0", PER_ANSWER),
            positive("grpo", "k3, times the importance ratio, mean over tokens; only with `beta`", PER_TOKEN),
            signed("rloo", "log-ratio of sampler to reference (k1), mean over tokens; only with `beta`", PER_TOKEN),
        ],
        "objective/kl": [
            signed(
                "ppo", "log-ratio of the sampler's answer to the reference (k1, or k3), a sum over tokens", PER_ANSWER
            ),
            signed("online_dpo", "log-ratio to the reference, a sum over **all places, padding included**", PER_ANSWER),
            signed(
                "xpo",
                "half of the log-ratio of the policy's answer plus half of that of the **reference's** answer: no KL",
                PER_ANSWER,
            ),
        ],
        "entropy": [
            positive("sft", "entropy of the next token at learned places; not with Liger", PER_TOKEN),
            positive("dpo kto", "entropy of the next token over all answers, chosen and rejected", PER_TOKEN),
            positive(
                "grpo rloo", "entropy of the next token of sampled answers, **at the sampling temperature**", PER_TOKEN
            ),
        ],
        "objective/entropy": [
            positive("ppo", "−log-probability of the sampled **answer**, at the sampling temperature", PER_ANSWER),
            positive(
                "online_dpo", "−log-probability of the answer, **padding included**, at temperature 1", PER_ANSWER
            ),
            positive("nash_md", "−`logps/chosen`: of the policy's answer, at temperature 1", PER_ANSWER),
            positive(
                "xpo", "half of −log-probability of the policy's answer, half of that of the reference's", PER_ANSWER
            ),
        ],
        "policy/entropy_avg": [
            positive("ppo", "entropy of the next token over all places, **padding included**", PER_TOKEN)
        ],
        "policy/approxkl_avg": [
            positive(
                "ppo", "k2: how far this round's steps have gone from the sampler; not from the reference", PER_TOKEN
            )
        ],
        "policy/clipfrac_avg": [share("ppo", "share of tokens without a gradient, since their ratio left the band")],
        "val/ratio": [positive("ppo", "importance ratio, mean over all places; padding counts as 1")],
        "val/ratio_var": [positive("ppo", "variance of the mean ratio over the passes of a round")],
        "val/clipfrac_avg": [share("ppo", "share of places where the **value** loss is the clipped one")],
        "clip_ratio/low_mean": [
            share("grpo", "share of **tokens** with a negative advantage and a ratio below the band"),
            share("rloo", "share of **answers** with a negative advantage and a ratio below the band"),
        ],
        "clip_ratio/high_mean": [
            share("grpo", "share of **tokens** with a positive advantage and a ratio above the band"),
            share("rloo", "share of **answers** with a positive advantage and a ratio above the band"),
        ],
        "clip_ratio/region_mean": [
            share("grpo", "`clip_ratio/low_mean` + `clip_ratio/high_mean`, of **tokens**"),
            share("rloo", "`clip_ratio/low_mean` + `clip_ratio/high_mean`, of **answers**"),
        ],
        "clip_ratio/low_min": [
            share("grpo", "smallest share of tokens below the band in one answer"),
            share("rloo", "share of passes in which **all** answers were below the band"),
        ],
        "clip_ratio/high_max": [
            share("grpo", "largest share of tokens above the band in one answer"),
            share("rloo", "share of passes in which **at least one** answer was above the band"),
        ],
        "clip_ratio": [
            share("grpo", "what Liger's loss reports as clipped; only with Liger, in place of the five above")
        ],
        "cispo_clip_ratio": [
            share(
                "grpo", "share of tokens with a positive advantage and a cut ratio; only `cispo`, in place of the five"
            )
        ],
        "vespo/phi_seq_mean": [positive("grpo", "mean weight of an answer; only `vespo`, in place of the five")],
        "sampling/sampling_logp_difference/mean": [
            positive(
                "grpo",
                "absolute difference of a token's log-probability between vLLM and training; only with vLLM",
                PER_TOKEN,
            )
        ],
        "sampling/sampling_logp_difference/max": [
            positive("grpo", "largest such difference in a round; only with vLLM", PER_TOKEN)
        ],
        "sampling/importance_sampling_ratio/min": [
            positive("grpo", "smallest weight that corrects for vLLM's probabilities; only with vLLM")
        ],
        "sampling/importance_sampling_ratio/mean": [positive("grpo", "mean of these weights; only with vLLM")],
        "sampling/importance_sampling_ratio/max": [positive("grpo", "largest of these weights; only with vLLM")],
    },
    "Answers: lengths, ends, tools": {
        "completions/mean_length": [
            positive(
                "grpo rloo",
                "mean length of the sampled answers, cut ones too (GRPO: without what tools wrote)",
                "tokens",
            )
        ],
        "completions/min_length": [positive("grpo rloo", "length of the shortest answer", "tokens")],
        "completions/max_length": [positive("grpo rloo", "length of the longest answer", "tokens")],
        "completions/clipped_ratio": [share("grpo rloo", "share of answers without an end: cut at the limit")],
        "completions/mean_terminated_length": [
            positive("grpo rloo", "mean length of the answers that ended; 0 if none did", "tokens")
        ],
        "completions/min_terminated_length": [
            positive("grpo rloo", "length of the shortest answer that ended; 0 if none did", "tokens")
        ],
        "completions/max_terminated_length": [
            positive("grpo rloo", "length of the longest answer that ended; 0 if none did", "tokens")
        ],
        "val/num_eos_tokens": [positive("ppo", "end tokens in the answers of a round, on the main process", "a count")],
        "val/contain_eos_token": [share("online_dpo", "share of answers with an end token, on the main process")],
        "val/model_contain_eos_token": [share("nash_md xpo", "share of the policy's answers with an end token")],
        "val/ref_contain_eos_token": [
            share("nash_md", "share of the **opponent's** answers (policy and reference mixed) with an end token"),
            share("xpo", "share of the **reference's** answers with an end token"),
        ],
        "tools/call_frequency": [positive("grpo", "tool calls per answer; only with tools")],
        "tools/failure_frequency": [share("grpo", "share of the tool calls that failed; only with tools")],
    },
    "Progress, time and settings": {
        "epoch": [
            positive(
                f"{OFFLINE} grpo rloo {ONLINE}",
                "passes through the data set: its rows, pairs or prompts; packs, if packed",
            ),
            positive("ppo", "answers sampled so far, divided by the number of prompts"),
        ],
        "step": [
            positive(f"{OFFLINE} grpo rloo {ONLINE}", "optimizer steps so far; only in `log_history`", "a count"),
            positive("ppo", "**rounds** so far, each of several optimizer steps; only in `log_history`", "a count"),
        ],
        "episode": [positive("ppo", "answers sampled so far, on all devices", "a count")],
        "num_tokens": [
            positive("sft", "tokens read so far: prompts too, padding not", "a count"),
            positive("reward dpo", "tokens read so far; each prompt twice, once with either answer", "a count"),
            positive(
                "kto", "tokens of the rows so far; the mismatched answers are read too, and not counted", "a count"
            ),
            positive("grpo rloo", "tokens so far: the answers, and the prompt once for each", "a count"),
        ],
        "beta": [positive(ONLINE, "the setting β")],
        "alpha": [positive("xpo", "the setting α: weight of the exploration term")],
        "mixture_coef": [share("nash_md", "the setting `mixture_coef`: weight of the reference in the opponent")],
        "step_time": [
            positive(
                "grpo rloo", "seconds of an optimizer step, sampling included; longer where it samples for several", "s"
            )
        ],
        "eps": [positive("ppo", "answers a second since training began, a whole number", "1/s")],
        "train_runtime": [positive(f"{OFFLINE} grpo rloo {ONLINE}", "duration of `train()`; in the last line", "s")],
        "train_samples_per_second": [
            positive(f"{PAIRS} reward", "**pairs** a second; in the last line", "1/s"),
            positive("sft kto bco gkd prm", "**rows** a second (SFT: packs, if packed); in the last line", "1/s"),
            positive(
                "grpo rloo",
                "**answers** a second with `max_steps`, prompts with `num_train_epochs`; in the last line",
                "1/s",
            ),
            positive(ONLINE, "**prompts** a second, each with two answers; in the last line", "1/s"),
        ],
        "train_steps_per_second": [
            positive(f"{OFFLINE} grpo rloo {ONLINE}", "optimizer steps a second; in the last line", "1/s")
        ],
        "train_loss": [signed(f"{OFFLINE} grpo rloo {ONLINE}", "mean of `loss` over the whole run; in the last line")],
        "total_flos": [
            positive(
                "sft reward dpo kto gkd prm",
                "an estimate from the weights and the tokens of `input_ids`: one forward and backward pass of one model",
            ),
            Meaning(
                f"orpo cpo bco grpo rloo {ONLINE}", "**always 0**: the batch has no `input_ids` to count", "", 0, 0
            ),
        ],
    },
}

EVALUATION: dict[str, list[Meaning]] = {  # what is not just the training key, of the evaluation set
    "eval_loss": [
        positive(
            "sft gkd",
            "mean over the tokens of each batch, then over **rows**; GKD: of the data's answers, never of sampled ones",
            PER_TOKEN,
        ),
        positive(f"reward {PAIRS} kto bco", "[`loss`](#loss) of each batch, weighted by its rows"),
        positive(
            "prm", "cross-entropy of a step's label, batches weighted by their rows, **times** processes", "nats a step"
        ),
    ],
    "eval_accuracy": [
        share("reward", "[`accuracy`](#accuracy), a mean of batch means"),
        share("prm", "share of the **steps** of the whole set that are judged as labelled; training has no such key"),
    ],
    "eval_delta": [signed("bco", "the shift that **training** has reached: [`delta`](#delta)", "β × nats an answer")],
    "eval_num_tokens": [
        positive("sft reward dpo kto", "the **training** total once more, not that of the evaluation", "a count")
    ],
    "eval_runtime": [positive(f"{OFFLINE} grpo rloo", "duration of the evaluation", "s")],
    "eval_samples_per_second": [
        positive(f"{PAIRS} reward", "**pairs** a second", "1/s"),
        positive("sft kto bco gkd prm", "**rows** a second (SFT: packs, if packed)", "1/s"),
        positive("grpo rloo", "**prompts** a second, however many answers each gets", "1/s"),
    ],
    "eval_steps_per_second": [
        positive(OFFLINE, "batches a second", "1/s"),
        positive("grpo rloo", "batches a second, counted in prompts and so too small", "1/s"),
    ],
}

# Worries that lean on the row above, on another word of their table or on a symbol of their page, said in full.
IN_FULL = {
    "loss": {
        "sft": "it is exactly 0.0: no token is learned, see the `labels`; it is the logarithm of the size of the "
        "vocabulary: the weights are random",
        "prm": "it starts far from 0.69 times accumulation steps and processes; it is exactly 0: rows without labels",
    },
    "loss/policy_avg": {"ppo": "never by itself: [see the first round](#the-first-round)"},
    "policy_loss": {"grpo": "it is [too small](#errors-in-the-code) for three loss types"},
    "rewards/NAME/mean": dict.fromkeys(("grpo", "rloo"), "one function falls while the sum rises"),
    "rewards/margins": {"nash_md": "it runs away while the scores stand still"},
    "policy/clipfrac_avg": {
        "ppo": "it grows from round to round: the steps are too many or too large; 0 all the time: `cliprange` does nothing"
    },
    "val/ratio": {
        "ppo": "far from 1; near 1/4, 1/2 or 2/3: `num_mini_batches` and `gradient_accumulation_steps` "
        "[are both above 1](#what-is-a-round)"
    },
    "clip_ratio/low_mean": {
        "rloo": "near the share of all answers with a negative advantage: the second use teaches nothing"
    },
    "clip_ratio/high_mean": {
        "grpo": "above about a tenth: answers are too old",
        "rloo": "near the share of all answers with a positive advantage: the second use teaches nothing",
    },
    "completions/mean_terminated_length": dict.fromkeys(("grpo", "rloo"), "0: no answer ended"),
    "val/ref_contain_eos_token": {"nash_md": "it is far below `val/model_contain_eos_token`"},
    "eval_rewards/rejected": {
        "bco": "it is exactly 0 after some training: "
        "[the reference was precomputed too late](#reference-log-probabilities-computed-beforehand)"
    },
}
WORRIES = {(key, trainer): text for key, texts in IN_FULL.items() for trainer, text in texts.items()}


# How a number of a line comes about, by trainer: for the table of trainers. "batch" is a micro-batch of all devices.
AVERAGES = {
    "sft reward dpo kto": "mean over the batches since the last line, of the value of each; what is left at the end of a "
    "run comes in its last line",
    "orpo cpo": "mean over the batches since the last line, of the value of each; what is left at the end of a run is never shown",
    "bco": "mean over the **rows** since the last line, `delta` over batches; what is left at the end of a run is never shown",
    "grpo rloo": "mean over the rounds and passes since the last line, of the value of each, NaN left out; what is left "
    "at the end of a run comes in its last line",
    "ppo": "a line for each round: over its answers, or over its passes",
    "online_dpo nash_md xpo": "mean over the batches since the last line, of the value of each; what is left at the end of a "
    "run is never shown",
    "gkd prm": "`loss` only: there is no other key of TRL's in a training line",
}


# ------------------------------------------------------------------------------------------------- what is read


def slug(key: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")


def section(trainer: str) -> str:
    """The part "Logged metrics" of a walkthrough, up to its first heading."""
    text = (ROOT / "annotated_trainers" / f"{trainer}.md").read_text("utf-8")
    return re.split(r"\n##+ ", text.split("\n## Logged metrics\n", 1)[1])[0]


@cache
def logged(trainer: str) -> dict[str, dict[str, str]]:
    """Key -> the cells of its row by the names of their columns, from the walkthrough."""
    lines = [line for line in section(trainer).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    if [name for name in head if name != "Unit, sign"] != COLUMNS or "Key" in [row[0] for row in rows[1:]]:
        raise ValueError(f"annotated_trainers/{trainer}.md: the table of logged metrics has the columns {head}")
    if wrong := [row for row in rows if len(row) != len(head)]:
        raise ValueError(f"annotated_trainers/{trainer}.md: a row of another length: {wrong[0]}")
    found = {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows[2:]}
    if len(found) != len(rows) - 2:
        raise ValueError(f"annotated_trainers/{trainer}.md: a key stands there twice")
    return found


def digest(trainer: str) -> str:
    """Of what a walkthrough says about its keys."""
    return hashlib.sha256(section(trainer).encode()).hexdigest()[:12]


def general(key: str) -> str:
    """`rewards/exact_answer/mean` is `rewards/NAME/mean`."""
    own = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/probabilities"}
    return key if key in own else re.sub(r"^rewards/.+/(mean|std)$", r"rewards/NAME/\1", key)


@cache
def bands(trainer: str) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
    """Key -> its smallest and largest value over the toy runs, in the first and in the last line; eval_ before and after."""
    result = measurement(trainer)
    found = {
        general(key): tuple((band["min"][line], band["max"][line]) for line in (0, -1))
        for key, band in result["log"].items()
    }
    for name, when in result["held_out"].items():
        if f"eval_{name}" in logged(trainer):
            found[f"eval_{name}"] = tuple((min(when[which]), max(when[which])) for which in ("before", "after"))
    return found


def steps(trainer: str) -> tuple[int, int]:
    """The first and the last step that the toy runs have logged."""
    logged_at = next(iter(measurement(trainer)["log"].values()))["step"]
    return logged_at[0], logged_at[-1]


# --------------------------------------------------------------------------------------------- what is put together


@cache
def meanings() -> dict[str, dict[str, list[Meaning]]]:
    """Group -> key -> meanings, with the keys of the evaluation as the last group."""
    groups = {title: dict(keys) for title, keys in GROUPS.items()}
    training = [key for keys in groups.values() for key in keys]
    evaluated = [key for trainer in TRAINERS for key in logged(trainer) if key.startswith("eval_")]
    order = {f"eval_{key}": place for place, key in enumerate(training)}
    groups["Evaluation"] = {}
    for key in sorted(dict.fromkeys(evaluated), key=lambda key: order.get(key, len(order))):
        plain = key.removeprefix("eval_")
        who = " ".join(trainer for trainer in TRAINERS if key in logged(trainer))
        groups["Evaluation"][key] = EVALUATION.get(key) or [of_evaluation(plain, who)]
    return groups


def of_evaluation(key: str, trainers: str) -> Meaning:
    """The same key, of the evaluation set; its range is that of training where the trainers agree on one."""
    of_training = next(keys[key] for keys in GROUPS.values() if key in keys)
    theirs = [meaning for meaning in of_training if set(meaning.trainers.split()) & set(trainers.split())]
    lows, highs = ({getattr(meaning, end) for meaning in theirs} for end in ("low", "high"))
    units = {meaning.unit for meaning in theirs}
    what = f"[`{key}`](#{slug(key)}) of the evaluation set"
    if len(lows) == len(highs) == len(units) == 1:
        return Meaning(trainers, what, units.pop(), lows.pop(), highs.pop())
    return Meaning(trainers, what, AS_IN_TRAINING)


def check() -> None:
    """Every key of every walkthrough has exactly one meaning here, and there is no other."""
    told = [
        (key, trainer) for keys in meanings().values() for key, found in keys.items()
        for meaning in found for trainer in trainers_of(meaning.trainers)
    ]  # fmt: skip
    true = [(key, trainer) for trainer in TRAINERS for key in logged(trainer)]
    for key, trainer in true:
        if told.count((key, trainer)) != 1:
            raise ValueError(f"`{key}` of {trainer} has {told.count((key, trainer))} meanings in tools/metrics.py")
    if more := set(told) - set(true):
        raise ValueError(f"tools/metrics.py has keys that no walkthrough lists: {sorted(more)}")
    if unused := set(WORRIES) - set(true):
        raise ValueError(f"tools/metrics.py has worries about keys that no walkthrough lists: {sorted(unused)}")


# ------------------------------------------------------------------------------------------------- what is shown


def link(trainer: str) -> str:
    return f"[{NAMES[trainer]}](../annotated_trainers/{trainer}.md#logged-metrics)"


def between(band: tuple[float, float]) -> str:
    low, high = map(number, band)
    return low if low == high else f"{low} to {high}"


def normal(key: str, trainers: list[str]) -> str:
    """The trainers, each with what its key was in the toy runs; those without a number come last, on one line."""
    lines = []
    for trainer in (trainer for trainer in trainers if key in bands(trainer)):
        first, last = (between(band) for band in bands(trainer)[key])
        lines.append(f"{link(trainer)} {first} → {last}")
    if others := [link(trainer) for trainer in trainers if key not in bands(trainer)]:
        lines.append(", ".join(others))
    return "<br>".join(lines)


def worry(key: str, trainer: str) -> str:
    text = WORRIES.get((key, trainer), logged(trainer)[key]["Worry when"])
    text = re.sub(r"\]\(#", f"](../annotated_trainers/{trainer}.md#", text)
    return re.sub(r"\]\((?=\w+\.md)", "](../annotated_trainers/", text)


def worries(key: str, trainers: list[str]) -> str:
    """When to worry, each warning once, with its trainers where it is not a warning for all."""
    found: dict[str, list[str]] = {}
    for trainer in trainers:
        found.setdefault(worry(key, trainer), []).append(trainer)
    found.pop("", None)
    if list(found.values()) == [trainers]:
        return next(iter(found))
    return "<br>".join(f"{', '.join(NAMES[name] for name in whose)}: {text}" for text, whose in found.items())


def rows(key: str, found: list[Meaning]) -> list[str]:
    lines = []
    for place, meaning in enumerate(found):
        trainers = trainers_of(meaning.trainers)
        anchor = slug(key) + (f"--{trainers[0].replace('_', '-')}" if place else "")
        cells = [f'<a id="{anchor}"></a>[`{key}`](#{anchor})', meaning.what, meaning.range]
        cells += [normal(key, trainers), worries(key, trainers)]
        if any("$" in cell or "|" in cell for cell in cells):
            raise ValueError(f"`{key}`: a formula or a column in {cells}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(title: str) -> None:
    """The keys of one group: what each is, in which trainers, what is normal and when to worry."""
    check()
    heading = "trainers: before → after" if title == "Evaluation" else "trainers: first line → last line"
    print(f"\n| key | what it is | unit, range | {heading} | worry when |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(line for key, found in meanings()[title].items() for line in rows(key, found)) + "\n")


def trainers() -> None:
    """How the numbers of a line come about in each trainer, and which lines of its toy runs are shown."""
    print(
        "\n| trainers, and the two lines of their toy runs | a number in a line is | `eval_` keys |\n| --- | --- | --- |"
    )
    for names, text in AVERAGES.items():
        shown, answers = [], set()
        for trainer in trainers_of(names):
            unit = "rounds" if trainer == "ppo" else "steps"
            shown.append(f"{link(trainer)}: {unit} {' and '.join(map(str, steps(trainer)))}")
            answers.add("yes" if any(key.startswith("eval_") for key in logged(trainer)) else "no")
        (answer,) = answers
        print(f"| {'<br>'.join(shown)} | {text} | {answer} |")
    print()


def count() -> None:
    """One sentence: how many keys there are."""
    keys = {key: found for group in meanings().values() for key, found in group.items()}
    training = [key for key in keys if not key.startswith("eval_")]
    several = [key for key in training if len(keys[key]) > 1]
    print(f"\nThere are {len(keys)} keys, {len(keys) - len(training)} of them of an evaluation.")
    print(f"Of the {len(training)} others, {len(several)} are not the same thing in all trainers that log them.\n")


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    print("READ = {")
    for trainer in TRAINERS:
        print(f'    "{trainer}": "{digest(trainer)}",')
    print("}")
