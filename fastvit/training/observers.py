"""What watches a run: a progress bar and TensorBoard logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .sharding import count_memory
from .throughput import peak_of

if TYPE_CHECKING:
    from rich.console import Console

    from .run import Run

SCALARS = {
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "test_accuracy": "accuracy/test",
    "ema_test_loss": "loss/ema_test",
    "ema_test_accuracy": "accuracy/ema_test",
    "lr": "learning_rate",
}


class Observer:
    """Called by the loop in the first process only. Nothing here may change what is trained."""

    def on_start(self, run: Run) -> None: ...

    def on_step(self, run: Run, steps: int) -> None: ...

    def on_epoch(self, run: Run) -> None: ...

    def on_end(self, run: Run) -> None: ...


class ProgressBar(Observer):
    """A bar over all epochs, with the loss and the last test accuracy; a line an epoch where `lines` is set."""

    def __init__(self, console: Console, *, lines: bool = True) -> None:
        from rich.progress import Progress

        self.lines = lines
        self.bar = Progress(console=console, transient=True)
        self.task = self.bar.add_task("training")

    def on_start(self, run: Run) -> None:
        if self.lines:
            train, test, classes = len(run.data.train), len(run.data.test), len(run.data.classes)
            self.bar.console.print(f"{train:,} images of {classes} classes, {test:,} to test on", highlight=False)
            if run.options.shard != "none":
                self.bar.console.print(f"each process holds {count_memory(run.model).words()}", highlight=False)
        self.peak = peak_of(run.team.device)
        self.bar.start()

    def on_step(self, run: Run, steps: int) -> None:
        loss = f"  loss {run.losses[-1]:.4f}" if run.losses else ""
        accuracy = f"  test {run.test_accuracy:.2%}" if run.history else ""
        speed = run.throughput.rate().words(self.peak)
        self.bar.update(
            self.task,
            total=run.options.epochs,
            completed=run.epoch + run.step / steps,  # epochs, which may have different numbers of steps
            description=f"epoch {run.epoch + 1}/{run.options.epochs}{loss}{accuracy}  {speed}",
        )

    def on_epoch(self, run: Run) -> None:
        if self.lines:
            row = run.history[-1]
            ema = f"  ema {row['ema_test_accuracy']:.2%}" if run.ema else ""
            self.bar.console.print(
                f"epoch {run.epoch:>3}/{run.options.epochs}  train loss {row['train_loss']:.4f}  "
                f"test loss {row['test_loss']:.4f}  test accuracy {row['test_accuracy']:.2%}{ema}  "
                f"{run.throughput.rate().words(self.peak)}",
                highlight=False,
            )

    def on_end(self, run: Run) -> None:
        self.bar.stop()


class TensorBoard(Observer):
    """Scalars for TensorBoard under OUTPUT/tensorboard. Raises ImportError where it is not installed."""

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.open = SummaryWriter

    def on_start(self, run: Run) -> None:
        # After a resume, what the broken-off run logged beyond the checkpoint is hidden.
        self.writer: Any = self.open(run.output / "tensorboard", purge_step=run.epoch + 1)

    def on_epoch(self, run: Run) -> None:
        row = run.history[-1]
        for name in [name for name in SCALARS if name in row]:
            self.writer.add_scalar(SCALARS[name], row[name], run.epoch)
        for name, value in run.throughput.rate()._asdict().items():
            self.writer.add_scalar(f"speed/{name}", value, run.epoch)

    def on_end(self, run: Run) -> None:
        self.writer.close()
