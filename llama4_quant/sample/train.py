"""Train the sample model: `python -m llama4_quant.sample.train --output DIR`.

First the vision tower learns to name what it sees (`tower.py`), in minutes. Then the whole model trains: every step
sees one batch of text windows (longer than the attention chunk, so that chunk borders, NoPE layers and tuned
temperature are learned) and one batch of chats (captions of images, questions about Python names). Step n is a function
of the seed and n alone: a run that was killed and resumed ends with the same weights as one that was not.

The run ends by itself: the schedule advances with the steps, or with the clock when the machine is too slow for the
time limit (only then do the weights depend on the machine's speed).
"""

import random
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from llama4_quant.python_text import collect
from llama4_quant.sample import shapes
from llama4_quant.sample.card import write_card
from llama4_quant.sample.configuration import Dimensions, hub_config
from llama4_quant.sample.data import Batch, TrainingData, chat_batch, prepare, text_batch
from llama4_quant.sample.evaluate import evaluate, render
from llama4_quant.sample.export import export
from llama4_quant.sample.held_out import held_out_text
from llama4_quant.sample.recipe import Recipe
from llama4_quant.sample.routed import TrainingModel
from llama4_quant.sample.run import Run
from llama4_quant.sample.tokenizer import train_tokenizer
from llama4_quant.sample.tower import AttributeHeads, TowerBatch, tower_batch, tower_loss

_Gradients = tuple[Tensor | None, ...]


def train_step(run: Run, data: TrainingData, pool: Executor) -> dict[str, float]:
    """Advance a run by one step; returns the losses in nats per token (of the tower: per image)."""
    started = time.monotonic()
    rng = random.Random(f"{run.recipe.seed}/{run.step}")  # noqa: S311
    first_stage = run.step < run.recipe.tower_steps
    losses = (_tower_step if first_stage else _model_step)(run, data, rng, pool)
    nn.utils.clip_grad_norm_([*run.lanes[0].parameters, *run.heads.parameters()], 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1
    run.seconds += time.monotonic() - started
    if first_stage:
        run.tower_seconds = run.seconds
    return losses


def _tower_step(run: Run, data: TrainingData, rng: random.Random, pool: Executor) -> dict[str, float]:
    """First stage: the vision tower, the projector and their attribute heads."""
    recipe = run.recipe
    progress = run.step / recipe.tower_steps
    run.set_rates(sight=recipe.tower_rate * recipe.rate(progress), reading=0.0)
    batches = [tower_batch(data.scenes, rng, size=recipe.tower_images // 2) for _ in run.lanes]
    results = list(pool.map(_tower_gradients, run.lanes, (run.heads,) * 2, batches))
    parameters = [*run.lanes[0].parameters, *run.heads.parameters()]
    _add_gradients(parameters, [gradients for _, gradients in results], scale=0.5)
    return {"tower": (results[0][0] + results[1][0]) / 2}


def _model_step(run: Run, data: TrainingData, rng: random.Random, pool: Executor) -> dict[str, float]:
    """Second stage: everything, the tower more slowly."""
    recipe = run.recipe
    rate = recipe.learning_rate * recipe.rate(run.progress)
    run.set_rates(sight=recipe.tower_share * rate, reading=rate)
    # One batch in four has windows twice as long, with half the rows: the same number of tokens.
    scale = 2 if run.step % 4 == 3 else 1
    text = text_batch(data, rng, rows=recipe.text_rows // scale, length=recipe.text_length * scale)
    chats = chat_batch(data, rng, captions=recipe.captions, questions=recipe.questions)
    results = list(pool.map(_gradients, run.lanes, (text, chats), (recipe.balance_weight,) * 2))
    _add_gradients(run.lanes[0].parameters, [gradients for _, gradients in results], scale=1.0)
    return {"text": results[0][0], "chat": results[1][0]}


def train(run: Run, data: TrainingData, work: Path, *, threads: int, save_every: int = 100) -> None:
    """Train to the end of the recipe, storing a checkpoint now and then and reporting to stderr.

    The two batches of a step are computed side by side, each in one thread: on a busy machine that loses far less time
    than splitting every operation, and the weights do not depend on the number of threads.
    """
    torch.set_num_threads(1)
    smoothed: dict[str, float] = {}
    with ThreadPoolExecutor(min(threads, 2)) as pool:
        while run.progress < 1.0:
            for name, loss in train_step(run, data, pool).items():
                smoothed[name] = 0.95 * smoothed.get(name, loss) + 0.05 * loss
            if run.step % 20 == 0:
                total = run.recipe.tower_steps + run.recipe.steps
                shown = "  ".join(f"{name} {loss:.3f}" for name, loss in smoothed.items())
                click.echo(
                    f"step {run.step}/{total}  {run.seconds / 60:.1f} min  {shown}",
                    err=True,
                )
            if run.step % save_every == 0:
                run.save(work)
    run.save(work)


def _gradients(lane: TrainingModel, batch: Batch, balance_weight: float) -> tuple[float, _Gradients]:
    loss, balance = lane.losses(batch.ids, batch.labels, batch.pixels)
    return loss.item(), torch.autograd.grad(loss + balance_weight * balance, lane.parameters, allow_unused=True)


def _tower_gradients(lane: TrainingModel, heads: AttributeHeads, batch: TowerBatch) -> tuple[float, _Gradients]:
    loss = tower_loss(lane.llama, heads, batch)
    return loss.item(), torch.autograd.grad(loss, [*lane.parameters, *heads.parameters()], allow_unused=True)


def _add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[_Gradients], *, scale: float) -> None:
    """Store the scaled sum; a parameter that no batch used keeps no gradient, so the optimizer leaves it alone."""
    for parameter, *parts in zip(parameters, *gradients, strict=True):
        used = [part for part in parts if part is not None]
        parameter.grad = torch.stack(used).sum(dim=0) * scale if used else None


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the finished checkpoint.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder of the resumable run [default: OUTPUT.work].")
@click.option("--steps", default=Recipe().steps, show_default=True, help="Length of the main stage.")
@click.option("--minutes", default=Recipe().minutes, show_default=True, help="The run ends by then at the latest.")
@click.option("--seed", default=Recipe().seed, show_default=True, help="Decides everything random.")
@click.option("--threads", default=2, show_default=True, help="Threads; two are enough.")
def main(*, output: Path, work: Path | None, steps: int, minutes: float, seed: int, threads: int) -> None:
    """Train the sample model, or continue a run that was interrupted; then evaluate it and write its card."""
    text = collect()
    captions = [scene.caption for scene in shapes.scenes(held_out=False)]
    tokenizer = train_tokenizer([*(d.text for d in text.train), *captions])
    data = prepare(text.train, tokenizer)
    hub = hub_config(tokenizer, Dimensions())
    recipe = Recipe(steps=steps, minutes=minutes, seed=seed)
    run = Run.start(recipe, hub)
    folder = work or output.with_name(output.name + ".work")
    run.resume(folder)
    click.echo(f"{len(data.stream):,} training tokens, {len(data.questions):,} questions, step {run.step}", err=True)
    train(run, data, folder, threads=threads)
    export(run.weights, hub, tokenizer, output)
    held_out = folder / "held_out.txt"
    held_out.write_text(held_out_text(text.held_out), encoding="utf-8")
    report = evaluate(output, text.train, held_out.read_text(encoding="utf-8"))
    write_card(output, report, recipe, steps=run.step, seconds=run.seconds)
    click.echo(render(report))


if __name__ == "__main__":
    main()
