"""ppo.py: what all scripts are tested for, and what only this one has to show."""

import json
import shutil
from pathlib import Path

import pytest
from examples import PROMPT, SHORT, TOY, USER, Example, logged, python, run, tiny_model

REWARD_MODEL = TOY / "reward_model"
LORA = ("--use_peft", "--lora_r", "4", "--learning_rate", "1e-3")


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class TestPPO(Example):
    name = "ppo"
    formats = {"conversational": {"prompt": USER}, "text": {"prompt": PROMPT + " "}}
    needs = ({"prompt"},)
    printed = {
        "prompt_ids": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>",
        "answer": r"[\d+= ]+ #\d+<\|end\|>",
        "score": r"-?\d+\.\d\d",
    }
    resumes = False
    removed = "1.13.0"
    flags = ("--reward_model_path", str(REWARD_MODEL), "--response_length", "100")

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

    # -- the four models -------------------------------------------------------------------------------------------------

    def test_policy_and_value_model_learn_and_the_others_stay(self, trained):
        import torch

        trainer = trained(*SHORT)
        policy, reward = weights(TOY / "policy"), weights(REWARD_MODEL)
        for model, before, changes in (
            (trainer.model.policy, policy, True),
            (trainer.ref_model, policy, False),
            (trainer.model.value_model, reward, True),
            (trainer.reward_model, reward, False),
        ):
            after = model.state_dict()
            assert any(not torch.equal(after[name], tensor) for name, tensor in before.items()) == changes

    def test_the_policy_starts_as_the_reference_and_leaves_it(self, call, tmp_path):
        for output, flags in (("whole", ("--learning_rate", "1e-3")), ("lora", LORA)):
            call(*flags, *SHORT, "--output_dir", output)
            log = logged(tmp_path / output)
            assert log[1]["objective/kl"] == pytest.approx(0, abs=1e-4)
            assert abs(log[2]["objective/kl"]) > 1e-3

    def test_with_lora_two_adapters_learn_in_float32(self, trained):
        import torch

        trainer = trained(*LORA, *SHORT, "--dtype", "bfloat16")
        learning = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        assert {name.split(".")[0] for name in learning} == {"policy", "value_model"}
        assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in learning.items())
        assert all(weight.abs().max() > 0 for name, weight in learning.items() if "lora_B" in name)  # 0 at the start
        assert trainer.model.policy.dtype == trainer.reward_model.dtype == torch.bfloat16
        assert trainer.ref_model is None

    def test_only_the_policy_is_saved_and_it_ends_its_answers(self, call, tmp_path):
        call(*SHORT, "--save_strategy", "steps", "--save_steps", "1")
        for folder in ("outputs/ppo-toy", "outputs/ppo-toy/checkpoint-1"):
            assert set(weights(tmp_path / folder)) == set(weights(TOY / "policy"))
            config = json.loads((tmp_path / folder / "generation_config.json").read_text())
            assert config["eos_token_id"] == 1  # without stop_token PPOTrainer takes it away

    @pytest.mark.parametrize("flags", [(), LORA], ids=["whole", "lora"])
    def test_two_processes_save_a_policy_that_loads(self, flags, path, tmp_path):
        import peft
        import transformers

        launch = [str(Path(python()[0]).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
        launch += [str(path), "--use_cpu", *SHORT, "--save_strategy", "steps", "--save_steps", "1", *flags]
        done = run(launch, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        for folder in ("outputs/ppo-toy", "outputs/ppo-toy/checkpoint-1"):
            if flags:
                peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / folder)
                continue
            _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
            assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    def test_it_goes_on_from_folders_that_sft_and_reward_have_written(self, call, tmp_path, capsys):
        folders = []
        for script, source in (("sft", TOY / "policy"), ("reward", REWARD_MODEL)):
            folders.append(shutil.copytree(source, tmp_path / "outputs" / f"{script}-toy"))
            (folders[-1] / "run.json").write_text(json.dumps({"script": script, "toy": True}))
        call("--model_name_or_path", folders[0], "--reward_model_path", folders[1], *SHORT)
        assert set(logged(tmp_path / "outputs" / "ppo-toy")) == {1, 2}
        assert "right answers" in capsys.readouterr().out

    def test_a_reward_model_that_trl_has_trained_is_taken(self, call, real, tiny_models, tmp_path):
        """With another body than the policy's."""
        from datasets import Dataset
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from trl import RewardConfig, RewardTrainer

        body = tiny_models["Llama"]
        trainer = RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(body, num_labels=1),
            args=RewardConfig(str(tmp_path / "reward"), max_steps=1, bf16=False, use_cpu=True, report_to=[]),
            processing_class=AutoTokenizer.from_pretrained(body),
            train_dataset=Dataset.from_list([{"chosen": "1+1=2", "rejected": "1+1=3"}] * 8),
        )
        trainer.train()
        trainer.save_model()
        call(*real(), "--reward_model_path", tmp_path / "reward")
        assert set(logged(tmp_path / "outputs" / "ppo-qwen3")) == {1}

    # -- settings that PPOTrainer leaves to its caller -------------------------------------------------------------------

    def test_prompts_are_padded_on_the_left(self, trained, real, tmp_path):
        rows = [{"prompt": text} for text in ("1+1 ", "1+1+1+1+1+1 ")] * 4
        trainer = trained(*real(rows))
        batch = next(iter(trainer.dataloader))["input_ids"]
        assert (batch[:, -1] != 0).all()

    @pytest.mark.parametrize(
        ("flags", "steps", "answers"),
        [
            (("--max_steps", "3"), 3, 6),
            (("--max_steps", "3", "--total_episodes", "4"), 2, 4),  # what PPOTrainer itself counts wins
            (("--max_steps", "-1", "--num_train_epochs", "2"), 8, 16),
        ],
    )
    def test_how_long_it_trains(self, flags, steps, answers, call, real, tmp_path):
        call(*real(), *flags)
        log = logged(tmp_path / "outputs" / "ppo-qwen3")
        assert set(log) == set(range(1, steps + 1))
        assert log[steps]["episode"] == answers

    def test_gradient_checkpointing_reaches_both_models_that_learn(self, trained, real):
        flags = real()
        for value in ("true", "false"):
            trainer = trained(*flags, "--gradient_checkpointing", value, "--output_dir", value)
            for model in (trainer.model.policy, trainer.model.value_model):
                assert model.is_gradient_checkpointing == (value == "true")

    def test_another_seed_is_another_run(self, call, tmp_path):
        for seed in ("1", "2"):
            call(*SHORT, "--seed", seed, "--output_dir", seed)
        one, two = (logged(tmp_path / seed)[2]["objective/scores"] for seed in ("1", "2"))
        assert one != two

    # -- the rows --------------------------------------------------------------------------------------------------------

    def test_rows_of_the_default_data_set_for_a_policy_that_thinks(self, call, real, tmp_path, capsys):
        """trl-lib/ultrafeedback-prompt: one column with a conversation. Qwen3's own template asks for thoughts."""
        import transformers
        import trl

        model = tiny_model(tmp_path / "qwen3", "Qwen3")
        template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
        for source in (model, shutil.copytree(REWARD_MODEL, tmp_path / "reward")):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
            tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", template
            tokenizer.save_pretrained(source)
            [architecture] = transformers.AutoConfig.from_pretrained(source).architectures
            grown = getattr(transformers, architecture).from_pretrained(source)
            grown.resize_token_embeddings(len(tokenizer))
            grown.save_pretrained(source)
        rows = [{"prompt": [{"content": "Which number follows 3?", "role": "user"}]}] * 4
        call(*real(rows, model=model), "--reward_model_path", tmp_path / "reward")
        printed = capsys.readouterr().out
        prompt = "<|im_start|>user\nWhich number follows 3?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert f"prompt_ids   {prompt}\n" in printed

    def test_long_prompts_are_left_out(self, trained, real, capsys):
        rows = [{"prompt": "1+1 "}] * 8 + [{"prompt": "1+" * 40 + "1 "}] * 8
        trainer = trained(*real(rows), "--max_prompt_length", "20")
        assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 8
        assert "8 of 16 prompts have more than 20 tokens" in capsys.readouterr().out

    # -- bad input -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--sft_model_path", "some/model"), ("--model_name_or_path", "never reads it")),
            (("--bf16", "true"), ("--dtype",)),
            (("--fp16", "true"), ("--dtype",)),
            (("--load_in_4bit",), ("--use_peft",)),
            (("--dataset_streaming",), ("--dataset_streaming",)),
            (("--num_mini_batches", "2", "--gradient_accumulation_steps", "2"), ("--gradient_accumulation_steps",)),
            (("--per_device_train_batch_size", "9"), ("9 prompts", "there are 8", "--per_device_train_batch_size")),
            (("--max_prompt_length", "2"), ("there are 0", "--max_prompt_length")),
            (("--response_length", "1"), ("response_length=1", "larger")),
        ],
        ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
    )
    def test_flags_that_cannot_be_meant_are_refused(self, flags, words, real, refused):
        message = refused(*real(), *flags)
        for word in words:
            assert word in message

    def test_batches_that_do_not_divide_are_refused(self, call, real, tmp_path):
        """By TRL, which names the two numbers."""
        with pytest.raises(ValueError, match=r"multiple of `num_mini_batches`, inexact division: 2 / 3"):
            call(*real(), "--num_mini_batches", "3")
        assert not any((tmp_path / "outputs" / "ppo-qwen3").iterdir())

    def test_a_run_cannot_be_resumed_and_says_so_before_it_loads_anything(self, real, refused, tmp_path):
        state = tmp_path / "outputs" / "ppo-qwen3" / "checkpoint-2" / "trainer_state.json"
        state.parent.mkdir(parents=True)
        state.write_text("{}")
        assert "cannot resume" in refused(*real(), "--resume_from_checkpoint", "true", "--reward_model_path", "no/such")

    def test_a_run_without_a_reward_model_is_refused(self, real, refused):
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
        flags = real()
        for folder in (tiny_models["Qwen3"], tiny_models["Gemma"]):
            message = refused(*flags, "--reward_model_path", folder)
            assert "is not a reward model" in message
            assert "would be random" in message

    @pytest.mark.parametrize("kind", ["CausalLM", "SequenceClassification"])
    def test_a_folder_with_an_adapter_is_refused_and_the_way_out_works(self, kind, call, real, refused, tmp_path):
        import peft
        import transformers

        source, adapter = (TOY / "policy", "adapter") if kind == "CausalLM" else (REWARD_MODEL, "judge")
        model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(source)
        task = "CAUSAL_LM" if kind == "CausalLM" else "SEQ_CLS"
        peft.get_peft_model(model, peft.LoraConfig(r=4, task_type=task)).save_pretrained(tmp_path / adapter)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        tokenizer.save_pretrained(tmp_path / adapter)
        flags = real(model=tmp_path / adapter) if kind == "CausalLM" else real()
        flags += ["--reward_model_path", tmp_path / adapter] if kind != "CausalLM" else []
        message = refused(*flags)
        assert f"peft.AutoPeftModelFor{kind}" in message

        loaded = getattr(peft, f"AutoPeftModelFor{kind}").from_pretrained(tmp_path / adapter)
        loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        tokenizer.save_pretrained(tmp_path / "merged")
        call(*(tmp_path / "merged" if flag == tmp_path / adapter else flag for flag in flags))
        assert list((tmp_path / "outputs").glob("*/model.safetensors"))

    def test_a_classifier_with_several_numbers_is_refused(self, real, refused, tiny_models, tmp_path):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        AutoModelForSequenceClassification.from_pretrained(tiny_models["Qwen3"], num_labels=3).save_pretrained(
            tmp_path / "classifier"
        )
        AutoTokenizer.from_pretrained(tiny_models["Qwen3"]).save_pretrained(tmp_path / "classifier")
        message = refused(*real(), "--reward_model_path", tmp_path / "classifier")
        assert "gives several" in message

    def test_a_reward_model_with_another_vocabulary_is_refused(self, real, refused, tmp_path):
        other = shutil.copytree(REWARD_MODEL, tmp_path / "other")
        path = other / "tokenizer.json"
        text = path.read_text()
        tokens = json.loads(text)
        vocabulary = tokens["model"]["vocab"]
        vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
        path.write_text(json.dumps(tokens))
        message = refused(*real(), "--reward_model_path", other)
        assert "another vocabulary" in message
        assert "'7'" in message or "'8'" in message

    def test_the_penalty_is_paid_by_cut_answers_whichever_token_ends_them(self, trained, own_model, real):
        """TRL looks for eos_token even where --stop_token_id ends the answers: then everybody would pay."""
        import json

        path = own_model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|system|>"}))
        flags = [*real(model=own_model), "--missing_eos_penalty", "5", "--response_length", "100"]
        trainer = trained(*flags, "--stop_token_id", "1")
        end = trainer.processing_class.convert_ids_to_tokens(1)
        assert trainer.processing_class.eos_token == end != "<|system|>"
