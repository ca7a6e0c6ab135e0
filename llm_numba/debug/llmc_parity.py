"""llm.c's acceptance test: llm-numba check-llmc MODEL.bin STATE.bin

Runs the batch of a debug state through the model, compares logits, loss and every gradient with those in the file, then
trains ten steps on that batch and compares their losses.
"""

from pathlib import Path

import numpy as np

from llm_numba.arena import Arena
from llm_numba.formats.llmc import read_model, read_state
from llm_numba.ops import choose_device, device_flags, get_ops
from llm_numba.training.memory_plan import complete, training_groups
from llm_numba.training.settings import Settings
from llm_numba.training.step import gradients, training_step
from llm_numba.training.weights import set_parameters
from llm_numba.util.cli import Parser, UserError, exit_with

# Measured against float64 with 12 layers of 384 channels: float32 changes a tensor by up to 9e-7 of its norm, and an
# element by up to 1e-5 of |x| + rms. The tolerances leave room for larger, trained models, and still find a change of
# 1% in any element above 0.03 rms.
NORM_TOLERANCE = 1e-4  # |ours - theirs| / |theirs|, Euclidean norms
ELEMENT_TOLERANCE = 3e-4  # the largest |ours - theirs| / (|theirs| + rms of theirs)
LOSS_TOLERANCE = 1e-3  # absolute; ten steps of Adam amplify rounding errors
OPTIMISER = Settings(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, grad_clip=0.0)
LEARNING_RATE = 1e-4
# Losses of GPT-2 124M on llm.c's batch, from llm.c's test; a state with the first loss is taken to be that batch
PUBLISHED = (5.270007, 4.059707, 3.375123, 2.800783, 2.315382, 1.849029, 1.394656, 0.999147, 0.624080, 0.376511)
FP32_VERSION = 3


Row = tuple[str, str, bool]  # what is compared, the numbers as text, whether they agree


def compare_tensors(what: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
    """By norm and by element; a NaN on either side differs."""
    difference, theirs = np.abs(np.subtract(ours, theirs, dtype=np.float64)), np.abs(theirs, dtype=np.float64)
    rms, norm, element = np.sqrt(np.mean(theirs**2)), 0.0, 0.0
    if difference.any():
        with np.errstate(invalid="ignore", divide="ignore"):
            norm, element = np.sqrt(np.mean(difference**2)) / rms, np.max(difference / (theirs + rms))
    agrees = bool(norm <= NORM_TOLERANCE and element <= ELEMENT_TOLERANCE)
    numbers = f"norm {norm:.1e} (at most {NORM_TOLERANCE:.0e}), element {element:.1e} (at most {ELEMENT_TOLERANCE:.0e})"
    return what, numbers, agrees


def compare(ops, model, parameters, state, losses) -> list[Row]:
    """Logits, gradients and loss of the state's batch, then the `losses` of training on it."""
    B, T = state.tokens.shape
    V = model.vocab_size
    groups = complete(training_groups(model, B, T), model, ops, "float32",
                      lambda ops, arena: training_step(ops, model, arena.training(), OPTIMISER))  # fmt: skip
    arena = Arena(groups, model, "reuse", ops)
    m = arena.training()
    set_parameters(ops, arena, parameters.items())
    ops.to_device(m.decays, 1)  # llm.c's test decays every tensor
    ops.to_device(m.batches, np.stack([state.tokens, state.targets])[None])
    ops.to_device(m.learning_rate, LEARNING_RATE)
    ops.to_device(m.limits, np.inf)

    ops.copy(m.tokens, m.batches[0, 0])
    model.forward(ops, m)
    logits = []
    for block in m.blocks:
        model.logits(ops, m, block)
        logits.append(np.array(ops.to_host(block.logits)[..., :V]).reshape(-1, V))
    rows = [compare_tensors("logits", np.concatenate(logits).reshape(B, T, V), state.logits)]
    found = []
    for step in range(1, len(losses) + 1 if losses else 2):
        gradients(ops, model, m)
        found.append(float(ops.to_host(m.loss)[0]))
        if step == 1:
            for name, theirs in state.gradients.items():
                ours = ops.to_host(arena.tensors["gradients", "d" + name])
                used = slice(V if name in model.vocab_parameters else None)
                rows.append(compare_tensors("d" + name, ours[used], theirs[used]))
        ops.to_device(m.step, step)
        model.update(ops, m, OPTIMISER)
    pairs = {"loss": (found[0], state.loss)}
    pairs |= {f"loss of step {i}": pair for i, pair in enumerate(zip(found, losses, strict=False), 1)}
    return rows + [
        (what, f"{ours:.6f}, expected {theirs:.6f}", abs(ours - theirs) <= LOSS_TOLERANCE)
        for what, (ours, theirs) in pairs.items()
    ]


def read_losses(path: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, Path(path).read_text().replace(",", " ").split()))
    except (OSError, ValueError) as error:
        raise UserError(f"--losses {path}: expected a text file of numbers ({error})") from error


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="llm-numba check-llmc", description="Run llm.c's acceptance test.")
    parser.add_argument("model", type=Path, metavar="MODEL.bin",
                        help="a model file of llm.c, version 3 (fp32); a bf16 model (version 5) cannot be compared, "
                        "since the debug state belongs to the weights before rounding")  # fmt: skip
    parser.add_argument("state", type=Path, metavar="STATE.bin", help="its debug state")
    parser.add_argument("--losses", type=read_losses, metavar="FILE", help="expected losses of the steps to train, as "
                        "a text file of numbers (default: for GPT-2 124M llm.c's ten)")  # fmt: skip
    device_flags(parser)
    args = parser.parse_args(argv)
    model, Vp, parameters = read_model(args.model, [FP32_VERSION])
    state = read_state(args.state, model, Vp)
    published = model.num_layers == 12 and abs(state.loss - PUBLISHED[0]) < LOSS_TOLERANCE
    losses = args.losses or (PUBLISHED if published else ())

    rows = compare(get_ops(choose_device(args.device)), model, parameters, state, losses)
    for what, numbers, agrees in rows:
        print(f"{what:<16} {numbers:<62} {'agrees' if agrees else 'DIFFERS'}")
    wrong = [what for what, _, agrees in rows if not agrees]
    if not losses:
        print("no expected losses of training steps: give them with --losses")
    print(f"{len(wrong)} of {len(rows)} differ: {', '.join(wrong)}" if wrong else f"all {len(rows)} agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    exit_with(main)
