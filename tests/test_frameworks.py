"""The model in others' hands: torch.compile, torch.export and Hugging Face's Trainer."""

import pytest
import torch
from torch.utils import _pytree as pytree

import mirasol
from tolerance import SAME_SUMS, assert_close

ONE_LAYER = {f"{part}_layers": 1 for part in ("encoder", "combiner", "av", "text", "reconstruction")}


def batch(config, clips: int = 3, chunks: int = 2) -> dict[str, torch.Tensor]:
    text = torch.randint(0, 256, (4, 6))
    return dict(
        video=torch.randint(0, 256, (clips, 3, chunks * config.frames_per_chunk, 32, 32), dtype=torch.uint8),
        audio=torch.randn(clips, chunks * config.samples_per_chunk) * 0.1,
        text=text,
        labels=text.masked_fill(torch.arange(6) < 2, -100),
        chunks=torch.tensor([2, 1, 2]),
        times=torch.tensor([[0.0, 3.0], [5.0, 0.0], [1.0, 2.0]]),
        video_present=torch.tensor([True, False, True]),
        audio_present=torch.tensor([True, True, False]),
        clip_of_text=torch.tensor([2, 0, 1, 0]),
    )


def make_model(**changes) -> mirasol.Model:
    torch.manual_seed(0)
    return mirasol.Model.from_preset("tiny", mask_ratio=0.0, **{**ONE_LAYER, **changes})


def test_output_reads_like_a_mapping_and_a_tuple():
    model = make_model().train()
    output = model(**batch(model.config))
    assert list(output) == ["loss", "losses", "logits", "latents"]
    assert output["loss"] is output.loss is output[0]
    assert output[1:] == (output.logits, output.latents)
    assert dict(output.losses)["text"] is output.losses.text
    assert "logits" not in make_model().eval()(batch(model.config)["video"])
    with pytest.raises(KeyError, match="depth"):
        output["depth"]
    leaves, spec = pytree.tree_flatten(output)
    assert len(leaves) == 8
    assert pytree.tree_unflatten(leaves, spec).losses.video is output.losses.video


@pytest.mark.slow
@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
def test_training_compiles_whole_with_presence_masks(combiner):
    model = make_model(combiner=combiner).train()
    inputs = batch(model.config)
    model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(**inputs)
    output.loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
def test_exports(combiner):
    model = make_model(combiner=combiner).eval()
    inputs = batch(model.config)
    expected = model(**inputs)
    program = torch.export.export(model, (), kwargs=inputs)
    output = program.module()(**inputs)
    assert isinstance(output, mirasol.Output)
    assert_close("logits", output.logits, expected.logits, rtol=SAME_SUMS)
    assert_close("loss", output.loss, expected.loss, rtol=SAME_SUMS)


def test_trains_and_evaluates_in_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra [text] is not installed")
    model = make_model()
    rows = []
    for index in range(8):
        inputs = batch(model.config, clips=1, chunks=1)
        row = {name: inputs[name] for name in ("video", "audio", "text", "labels")}
        rows.append({name: value[index % value.shape[0]] for name, value in row.items()})
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, logging_steps=1, report_to=[], save_strategy="no",
        remove_unused_columns=False, dataloader_pin_memory=False, learning_rate=1e-2, lr_scheduler_type="constant",
        use_cpu=True, disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    predictions = trainer.predict(rows).predictions
    assert predictions[0].shape == (8, 6, model.config.vocab_size)
