"""orpo.py: what all scripts are tested for, what it shares with cpo.py, and what only this one has to show."""

import json
import math

import pytest
from examples import PREFERENCE, RIGHT
from test_example_cpo import Pairs, by_hand


class TestORPO(Pairs):
    name = "orpo"
    least = 0.95
    printed = {
        "chosen_input_ids": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>[\d+= ]+ #\d+<\|end\|>",
        "chosen_labels": r"[\d+= ]+ #\d+<\|end\|>",
        "rejected_labels": r"\d.*<\|end\|>",
    }

    def test_the_first_figures_are_those_of_the_formula(self, bare, script):
        """Computed by hand: the first term over prompt and chosen answer, the odds from means over the answer's tokens."""
        import torch

        def nll(batch):
            return -torch.cat([torch.cat([prompt, chosen]) for prompt, chosen, _ in batch]).mean().item()

        def log_odds(answers):
            probability = torch.stack([answer.double().mean() for answer in answers]).exp()
            return (probability / (1 - probability)).log()

        def loss(batch):
            gain = log_odds([chosen for _, chosen, _ in batch]) - log_odds([rejected for _, _, rejected in batch])
            return nll(batch) - script.TOY["beta"] * gain.sigmoid().log().mean().item()

        before = json.loads((bare[0] / "held_out.json").read_text())["before"]
        expected, pairs = by_hand(loss)
        assert before["loss"] == pytest.approx(expected, abs=1e-3)
        assert before["nll_loss"] == pytest.approx(by_hand(nll)[0], abs=1e-4)
        right = [(chosen.mean() > rejected.mean()).item() for _, chosen, rejected in pairs]
        assert before["rewards/accuracies"] == pytest.approx(sum(right) / len(right), abs=1e-6)

    @pytest.mark.parametrize("beta", [0.1, 10.0])
    def test_what_a_pair_of_equal_answers_costs(self, beta, trainer):
        row = PREFERENCE["text, explicit prompt"]
        metrics = trainer([row | {"rejected": RIGHT}] * 2, "--beta", str(beta)).evaluate()
        assert metrics["eval_loss"] - metrics["eval_nll_loss"] == pytest.approx(beta * math.log(2), abs=1e-4)
        assert metrics["eval_log_odds_chosen"] == 0
        assert metrics["eval_rewards/accuracies"] == 0  # equal is not greater

    def test_most_of_the_first_loss_is_about_the_prompts(self, bare):
        """What the comment on beta says: the policy writes answers well and has never written a problem."""
        import torch

        def share(batch):
            prompts, answers = (torch.cat([pair[place] for pair in batch]).sum() for place in (0, 1))
            return (prompts / (prompts + answers)).item()

        assert by_hand(share)[0] > 0.95

    def test_an_answer_that_is_certain_leaves_the_gradient_finite(self, trainer):
        import torch
        from trl.experimental.orpo import ORPOTrainer

        mended = trainer([PREFERENCE["text, explicit prompt"]] * 2)
        for method, finite in ((ORPOTrainer.odds_ratio_loss, False), (type(mended).odds_ratio_loss, True)):
            certain, other = torch.zeros(1, requires_grad=True), torch.tensor([-0.5], requires_grad=True)
            losses = method(mended, certain - 1e-9, other)[0]
            gradients = torch.autograd.grad(losses.sum(), (certain, other))
            assert all(gradient.isfinite().all() for gradient in gradients) == finite

    def test_what_a_row_says_to_its_template_is_kept(self, script):
        from datasets import Dataset

        row = {"prompt": "7+9", "chosen": "16", "rejected": "17", "label": True}
        kept = script.only_pairs(Dataset.from_list([row | {"chat_template_kwargs": {"enable_thinking": False}}]))
        assert set(kept.column_names) == {"prompt", "chosen", "rejected", "chat_template_kwargs"}
