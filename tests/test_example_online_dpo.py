"""online_dpo.py: what all scripts are tested for, what it shares with xpo.py and nash_md.py, and what only it has to show."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from examples import PROMPT, SHORT, TOY, USER, Example, functions, logged, losses, tiny_model, write_rows

REWARD_MODEL = TOY / "reward_model"
LORA = ("--use_peft", "--lora_r", "4", "--learning_rate", "1e-3")


def qwen3(folder: Path) -> Path:
    """Gives a model of the toy's vocabulary the chat template of Qwen3, which asks for thoughts."""
    import transformers
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(folder)
    [architecture] = transformers.AutoConfig.from_pretrained(folder).architectures
    grown = getattr(transformers, architecture).from_pretrained(folder)
    grown.resize_token_embeddings(len(tokenizer))
    grown.save_pretrained(folder)
    return folder


class OnlinePairs(Example):
    """What online_dpo.py, xpo.py and nash_md.py have in common: they sample two answers, and a reward model compares them."""

    formats = {"conversational": {"prompt": USER, "answer": "19"}, "text": {"prompt": PROMPT + " ", "answer": "19"}}
    needs = ({"prompt"},)
    flags = ("--reward_model_path", str(REWARD_MODEL), "--max_new_tokens", "100", "--max_length", "200")
    lists: ClassVar[tuple[str, ...]] = ("beta",)  # flags for which TRL takes a list and breaks off

    @pytest.fixture
    def trained(self, call, script, monkeypatch):
        """A function that runs the script and gives its trainer."""
        seen = []
        show_row = script.show_row
        monkeypatch.setattr(script, "show_row", lambda trainer: (seen.append(trainer), show_row(trainer)))

        def trainer(*arguments):
            call(*arguments)
            return seen[-1]

        return trainer

    # -- the models ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("flags", [("--learning_rate", "1e-3"), LORA], ids=["whole", "lora"])
    def test_the_policy_learns_and_the_others_stay(self, flags, trained):
        import torch
        from safetensors.torch import load_file

        trainer = trained(*flags, *SHORT)
        policy, reward = (load_file(folder / "model.safetensors") for folder in (TOY / "policy", REWARD_MODEL))
        judge = trainer.reward_funcs[0] if isinstance(trainer.reward_funcs, list) else trainer.reward_funcs
        for name, tensor in judge.state_dict().items():
            assert torch.equal(tensor, reward[name])
        if trainer.ref_model is not None:
            for name, tensor in policy.items():
                assert torch.equal(trainer.ref_model.state_dict()[name], tensor), name
        before = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        assert before
        assert all("lora_" in name for name in before) == (flags == LORA)
        if flags == LORA:  # the half that starts at zero has left it
            assert all(weight.abs().max() > 0 for name, weight in before.items() if "lora_B" in name)

    def test_gradients_are_averaged_over_the_batches_of_a_step(self, trained):
        """TRL's training_step leaves that to accelerate, which is told to do nothing."""
        import torch

        norms = []
        for size, steps in ((8, 1), (2, 4)):
            trainer = trained(
                *("--max_steps", "1", "--logging_steps", "1", "--output_dir", f"run-{size}"),
                *("--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(steps)),
            )
            weight = torch.ones(1, requires_grad=True)
            for _ in range(steps):
                trainer.accelerator.backward(weight.sum())
            norms.append(weight.grad.item())
        assert norms == [1, 1]

    # -- the rows --------------------------------------------------------------------------------------------------------

    def test_rows_of_the_default_data_set_for_a_policy_that_thinks(self, call, real, tiny_models, tmp_path, capsys):
        """trl-lib/ultrafeedback-prompt: one column with a conversation. Qwen3's own template asks for thoughts."""
        model = qwen3(tiny_model(tmp_path / "qwen3", "Qwen3"))
        judge = qwen3(shutil.copytree(REWARD_MODEL, tmp_path / "judge"))
        rows = [{"prompt": [{"content": "Which number follows 3?", "role": "user"}]}] * 4
        call(*real(rows, model=model), "--reward_model_path", judge, "--max_new_tokens", "150", "--max_length", "300")
        printed = capsys.readouterr().out
        prompt = "<|im_start|>user\nWhich number follows 3?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert re.search(rf"^prompt_ids +{re.escape(prompt)}$", printed, re.M)

    @pytest.mark.parametrize("adds_it", [True, False], ids=["adds BOS", "knows BOS"])
    @pytest.mark.parametrize("end", ["text", "user", "assistant"])
    def test_the_prompt_on_the_screen_is_the_one_that_is_trained_on(
        self, end, adds_it, script, trained, real, own_model, monkeypatch
    ):
        """With a BOS token, which the tokenizer adds to text by itself (Llama's) or not (GPT-2's)."""
        import transformers
        from tokenizers.processors import TemplateProcessing

        tokenizer = transformers.AutoTokenizer.from_pretrained(own_model)
        tokenizer.bos_token = "<|user|>"
        if adds_it:
            bos = (tokenizer.bos_token, tokenizer.bos_token_id)
            single = f"{bos[0]} $A"
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[bos])
        tokenizer.save_pretrained(own_model)
        turns = [*USER, {"role": "assistant", "content": "1+"}]
        prompt = {"text": PROMPT, "user": USER, "assistant": turns}[end]

        prompts, generate = [], transformers.GenerationMixin.generate

        def spy(model, *arguments, **named):
            ids = arguments[0] if arguments else named["input_ids"]
            prompts.append(ids[0][named["attention_mask"][0].bool()].tolist())
            return generate(model, *arguments, **named)

        monkeypatch.setattr(transformers.GenerationMixin, "generate", spy)
        trainer = trained(*real([{"prompt": prompt}] * 8, model=own_model))
        before = len(prompts)
        trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
        [theirs] = {tuple(ids) for ids in prompts[before:]}
        assert script.prompt_ids({"prompt": prompt}, trainer.processing_class) == list(theirs)

    def test_a_stream_trains(self, call, real, tmp_path):
        call(*real(), "--dataset_streaming", "--output_dir", "streamed")
        assert set(logged(tmp_path / "streamed")) == {1}

    def test_fewer_prompts_than_a_batch_train_too(self, call, real, tmp_path):
        call(*real([{"prompt": USER}] * 3), "--per_device_train_batch_size", "8", "--max_steps", "2")
        assert set(logged(tmp_path / "outputs" / f"{self.name}-qwen3")) == {1, 2}

    def test_long_prompts_are_left_out(self, trained, real, capsys):
        rows = [{"prompt": "1+1 "}] * 8 + [{"prompt": "1+" * 40 + "1 "}] * 8
        trainer = trained(*real(rows), "--max_length", "120")
        assert len(trainer.train_dataset) == 8
        assert "8 of 16 prompts have more than 20 tokens and are left out" in capsys.readouterr().out

    def test_an_evaluation_between_the_steps_is_left_out_and_the_samples_stay(self, call, real, capsys):
        """TRL's evaluate() raises a ValueError; the held-out prompts are for the samples before and after."""
        call(*real(), "--eval_strategy", "steps", "--eval_steps", "1")
        assert len(re.findall("^    after: ", capsys.readouterr().out, re.M)) == 2

    def test_it_goes_on_from_folders_that_sft_and_reward_have_written(self, call, tmp_path, capsys):
        folders = []
        for script, source in (("sft", TOY / "policy"), ("reward", REWARD_MODEL)):
            folders.append(shutil.copytree(source, tmp_path / "outputs" / f"{script}-toy"))
            (folders[-1] / "run.json").write_text(json.dumps({"script": script, "toy": True}))
        call("--model_name_or_path", folders[0], "--reward_model_path", folders[1], *SHORT)
        assert set(logged(tmp_path / "outputs" / f"{self.name}-toy")) == {1, 2}
        assert "right answers" in capsys.readouterr().out

    # -- bad input -------------------------------------------------------------------------------------------------------

    def test_a_run_without_anything_that_judges_is_refused(self, real, refused):
        flags = real()
        place = flags.index("--reward_model_path")
        message = refused(*flags[:place], *flags[place + 2 :])
        assert "give --reward_model_path" in message
        assert "reward.py" in message

    def test_a_reward_model_that_is_nowhere_is_refused(self, real, refused):
        assert "cannot load the reward model 'no/such-model'" in refused(
            *real(), "--reward_model_path", "no/such-model"
        )

    def test_a_language_model_as_reward_model_is_refused(self, real, refused, tiny_models):
        message = refused(*real(), "--reward_model_path", tiny_models["Qwen3"])
        assert "is not a reward model" in message
        assert "would be random" in message

    def test_a_classifier_with_several_numbers_is_refused(self, real, refused, tiny_models, tmp_path):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        AutoModelForSequenceClassification.from_pretrained(tiny_models["Qwen3"], num_labels=3).save_pretrained(
            tmp_path / "classifier"
        )
        AutoTokenizer.from_pretrained(tiny_models["Qwen3"]).save_pretrained(tmp_path / "classifier")
        assert "gives several" in refused(*real(), "--reward_model_path", tmp_path / "classifier")

    @pytest.mark.parametrize("kind", ["CausalLM", "SequenceClassification"])
    def test_a_folder_with_an_adapter_is_refused(self, kind, real, refused, tmp_path):
        import peft
        import transformers

        source, task = (TOY / "policy", "CAUSAL_LM") if kind == "CausalLM" else (REWARD_MODEL, "SEQ_CLS")
        model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(source)
        peft.get_peft_model(model, peft.LoraConfig(r=4, task_type=task)).save_pretrained(tmp_path / "adapter")
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "adapter")
        flags = real(model=tmp_path / "adapter") if kind == "CausalLM" else real()
        flags += ["--reward_model_path", tmp_path / "adapter"] if kind != "CausalLM" else []
        assert f"peft.AutoPeftModelFor{kind}" in refused(*flags)

    @pytest.fixture
    def other_words(self, tmp_path) -> Path:
        """The reward model, with a tokenizer in which 7 and 8 have changed places."""
        folder = shutil.copytree(REWARD_MODEL, tmp_path / "other")
        tokens = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = tokens["model"]["vocab"]
        vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
        return folder

    def test_a_list_for_the_epochs_is_refused(self, refused):
        for flag in self.lists:
            message = refused(f"--{flag}", "0.1", "0.2")
            assert f"--{flag}" in message
            assert "one number" in message

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--max_new_tokens", "200"), ("max_length=200", "max_new_tokens=200", "larger --max_length")),
            (("--max_length", "102"), ("no prompt has at most 2 tokens", "larger --max_length")),
            (("--max_new_tokens", "1"), ("max_new_tokens=1 ", "larger --max_new_tokens")),
        ],
        ids=["no room for a prompt", "too little room", "every answer cut"],
    )
    def test_lengths_that_leave_nothing_are_refused(self, flags, words, real, refused):
        message = refused(*real(), *flags)
        for word in words:
            assert word in message

    def test_answers_that_are_cut_are_counted(self, call, capsys):
        call(*SHORT, "--max_new_tokens", "33")
        assert re.search(r"^\d+ of 16 sampled answers were cut at 33 tokens\.$", capsys.readouterr().out, re.M)


class TestOnlineDPO(OnlinePairs):
    name = "online_dpo"
    printed = {
        "prompt_ids": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>",
        "answer": r"\d+",
        "chosen": r".*#\d+<\|end\|>",
        "rejected": r".*#\d+<\|end\|>",
        "reward": r"-?\d+\.\d+ -?\d+\.\d+",
    }

    @pytest.fixture
    def rewards(self, tmp_path):
        """A function that writes a module with a reward function and gives its dotted path."""

        def write(code: str) -> str:
            module = f"judges_of_{tmp_path.name}_{len(list(tmp_path.glob('*.py')))}"
            (tmp_path / f"{module}.py").write_text(code)
            return f"{module}.mine"

        path = list(sys.path)
        yield write
        sys.path[:] = path

    # -- the loss and the rewards ----------------------------------------------------------------------------------------

    def test_the_policy_starts_as_the_reference_and_leaves_it(self, call, tmp_path):
        for output, flags in (("whole", ("--learning_rate", "1e-3")), ("lora", LORA)):
            call(*flags, *SHORT, "--output_dir", output)
            log = logged(tmp_path / output)
            assert log[1]["loss"] == pytest.approx(0.6931, abs=1e-4)
            assert log[1]["objective/kl"] == pytest.approx(0, abs=1e-4)
            assert abs(log[2]["rewards/chosen"]) > 1e-3

    def test_the_pair_on_the_screen_is_one_that_the_trainer_makes(self, script, trained, monkeypatch, capsys):
        """The look at the rewards and TRL's own code give the same numbers to the same answers."""
        seen = {}
        look = script.look_at_rewards

        def spy(trainer, rows, answers):
            seen["look"] = look(trainer, rows, answers)["reward"]
            texts = trainer.processing_class.batch_decode(answers, skip_special_tokens=True)
            seen["trl"] = trainer._calculate_rewards_from_functions(
                [row["prompt"] for row in rows],
                [[{"role": "assistant", "content": text}] for text in texts],
                answers,
                answer=[row["answer"] for row in rows],
            ).tolist()
            return look(trainer, rows, answers)

        monkeypatch.setattr(script, "look_at_rewards", spy)
        trained(
            *SHORT, "--reward_funcs", "exact_answer", "brevity", "--reward_weights", "2", "5", "--max_new_tokens", "38"
        )
        assert seen["look"] == pytest.approx(seen["trl"], abs=0.01)
        first, second = re.search(r"^reward +(\S+) (\S+)$", capsys.readouterr().out, re.M).groups()
        assert float(first) > float(second)

    def test_an_answer_that_is_cut_pays_for_it_in_the_pair_on_the_screen_too(self, script, trained, monkeypatch):
        seen = []
        look = script.look_at_rewards
        monkeypatch.setattr(
            script, "look_at_rewards", lambda *given: seen.append((given[2], look(*given))) or seen[-1][1]
        )
        trained(*SHORT, "--max_new_tokens", "33", "--missing_eos_penalty", "3")
        [(answers, rewards)] = seen
        paid = [score - total for score, total in zip(rewards["reward_model"], rewards["reward"], strict=True)]
        assert paid == pytest.approx([0 if 1 in answer else 3 for answer in answers])
        assert {round(value) for value in paid} == {0, 3}

    def test_what_it_shares_with_grpo_and_rloo_is_the_same_to_the_letter(self):
        own, *others = (functions(name) for name in (self.name, "grpo", "rloo"))
        for other in others:
            for function in ("text_of", "number_in", "exact_answer", "answer_format", "brevity"):
                assert own[function] == other[function]
            default = 'names = script_args.reward_funcs\n    if names is None:\n        names = [] if script_args.reward_model_name_or_path else ["exact_answer"]\n'
            assert default in other["reward_functions"]
            there = other["reward_functions"].replace(default, "names = script_args.reward_funcs or []\n")
            assert own["reward_functions"] == there.replace("reward_model_name_or_path", "reward_model_path")

    def test_the_same_reward_functions_as_in_grpo_without_the_reward_model(self, call, tmp_path, capsys):
        call(
            *SHORT,
            "--reward_funcs",
            "exact_answer",
            "answer_format",
            "--reward_weights",
            "1",
            "0.5",
            "--output_dir",
            "run",
        )
        printed = capsys.readouterr().out
        assert "reward_model" not in printed
        assert re.search(r"^exact_answer +1\.0 0\.0$", printed, re.M)
        assert 0.8 < logged(tmp_path / "run")[1]["objective/scores"] < 1.5

    def test_functions_and_a_reward_model_add_up(self, call, tmp_path, capsys):
        judge = shutil.copytree(REWARD_MODEL, tmp_path / "judge")
        call(*SHORT, "--reward_funcs", "exact_answer", "--reward_model_path", judge, "--reward_weights", "10", "1")
        printed = capsys.readouterr().out
        [truth, score, total] = (
            [float(number) for number in re.search(rf"^{name} +(\S+) (\S+)$", printed, re.M).groups()]
            for name in ("exact_answer", "judge", "reward")
        )
        assert total == pytest.approx([10 * a + b for a, b in zip(truth, score, strict=True)], abs=0.01)

    def test_a_reward_function_of_ones_own_gets_what_grpo_would_give_it(self, call, rewards, tmp_path):
        name = rewards(
            "def mine(prompts, completions, completion_ids, answer, log_metric, **others):\n"
            "    log_metric('length', 1.0)\n"
            "    assert prompts[0][0]['role'] == 'user' and completions[0][0]['role'] == 'assistant'\n"
            "    assert len(prompts) == len(completions) == len(completion_ids) == len(answer)\n"
            "    assert prompts[: len(prompts) // 2] == prompts[len(prompts) // 2 :]\n"
            "    assert all(0 not in ids and ids[-1] == 1 for ids in completion_ids)  # no padding, and an end\n"
            "    assert len({len(ids) for ids in completion_ids}) > 1\n"
            "    return [None if a == '21' else -float(len(ids)) for a, ids in zip(answer, completion_ids)]\n"
        )
        call(*SHORT, "--reward_funcs", name, "--output_dir", "run")
        assert -40 <= logged(tmp_path / "run")[1]["objective/scores"] <= -25

    def test_the_rewards_of_trl_itself_have_dotted_paths_too(self, script):
        from trl.rewards import accuracy_reward

        script_args = script.Arguments(reward_funcs=["trl.rewards.accuracy_reward"])
        assert script.reward_functions(script_args, {"prompt", "solution"}) == [accuracy_reward]

    def test_a_reward_model_of_another_family_reads_text(self, other_words, call, tmp_path):
        """It gets the answers as text and takes its own tokenizer to them; here it reads each 7 as an 8."""
        for judge in (REWARD_MODEL, other_words):
            call(*SHORT, "--reward_model_path", judge, "--output_dir", f"with-{judge.name}")
        same, other = (logged(tmp_path / f"with-{judge.name}")[1] for judge in (REWARD_MODEL, other_words))
        assert same["logps/chosen"] + same["logps/rejected"] == pytest.approx(
            other["logps/chosen"] + other["logps/rejected"], abs=1e-3
        )
        assert other["objective/scores"] < same["objective/scores"]

    def test_checkpointed_gradients_do_not_turn_off_the_cache(self, trained, real):
        flags = real()
        for value in ("true", "false"):
            trainer = trained(*flags, "--gradient_checkpointing", value, "--output_dir", value)
            assert trainer.generation_config.use_cache
            assert trainer.model.is_gradient_checkpointing == (value == "true")

    def test_checkpointed_gradients_are_the_same(self, call, tmp_path):
        for value in ("true", "false"):
            call(*SHORT, "--gradient_checkpointing", value, "--output_dir", value)
        assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), abs=1e-3)

    # -- bad input -------------------------------------------------------------------------------------------------------

    def test_data_without_the_column_of_the_reward_function_are_refused(self, real, refused):
        text = refused(*real([{"prompt": USER, "solution": "19"}] * 8), "--reward_funcs", "exact_answer")
        for words in ("'exact_answer'", "missing a required argument: 'answer'", "'solution'", "--reward_funcs"):
            assert words in text

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            ("def mine(completions, **others): return [1.0]", "returned 1 values for 16 answers"),
            ("def mine(completions, **others): return [float('nan')] * len(completions)", "returned NaN"),
            ("def mine(completions, **others): return [None] * len(completions)", "all returned None"),
            (
                "def mine(completions, **others): return [None] + [-1.0] * (len(completions) - 1)",
                "returned None for one answer and a number for the other",
            ),
            ("def mine(completions): return [1.0] * len(completions)", "got an unexpected keyword argument"),
            ("def yours(completions, **others): return [1.0] * len(completions)", "has no attribute 'mine'"),
            ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        ],
        ids=["too few", "NaN", "None for all", "None for one", "takes too little", "no such function", "broken module"],
    )
    def test_a_bad_reward_function_is_refused(self, code, words, rewards, refused):
        name = rewards(code)
        text = refused("--reward_funcs", name)
        assert words in text
        assert "mine" in text or words == "all returned None"

    def test_a_reward_function_that_turns_bad_breaks_off_the_training(self, rewards, call):
        name = rewards(
            "calls = []\n"
            "def mine(completions, **others):\n"
            "    calls.append(1)\n"
            "    return [None if len(calls) > 2 and n == 0 else float(n) for n in range(len(completions))]\n"
        )
        with pytest.raises(ValueError, match="returned None for one answer and a number for the other"):
            call("--max_steps", "5", "--reward_funcs", name)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("my_modul.my_function", "No module named 'my_modul'"),
            ("exact", "['answer_format', 'brevity', 'exact_answer']"),
        ],
    )
    def test_a_reward_function_that_is_nowhere_is_refused(self, name, words, refused):
        text = refused("--reward_funcs", name)
        assert f"{name!r}" in text
        assert words in text

    def test_weights_that_do_not_fit_are_refused_by_trl(self, call, tmp_path):
        with pytest.raises(
            ValueError, match=r"Number of reward weights \(2\) must match number of reward functions \(1\)"
        ):
            call("--reward_weights", "1", "2")
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_a_reward_model_without_a_chat_template_is_refused_for_conversations(self, real, call, refused, tmp_path):
        judge = shutil.copytree(REWARD_MODEL, tmp_path / "judge")
        (judge / "chat_template.jinja").unlink()
        message = refused(*real(), "--reward_model_path", judge)
        assert "no chat template" in message
        assert str(judge) in message
        call(*real(data=write_rows(tmp_path / "text", [self.formats["text"]] * 8)), "--reward_model_path", judge)

    def test_a_function_that_waits_is_waited_for_as_in_grpo(self, call, real, rewards, tmp_path):
        name = rewards(
            "async def mine(completions, **others): return [float(len(c[0]['content'])) for c in completions]"
        )
        call(*real(), "--reward_funcs", name)
        assert set(logged(tmp_path / "outputs" / "online_dpo-qwen3")) == {1}
