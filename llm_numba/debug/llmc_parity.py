"""llm.c's own acceptance test: python -m llm_numba.formats.llmc_parity MODEL.bin STATE.bin

Runs the batch of a debug state through the model, compares logits, loss and every gradient with those in the file, then
trains ten steps on that batch and compares their losses.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from llm_numba.arena import Arena, training_groups
from llm_numba.formats.llmc import read_model, read_state
from llm_numba.formats.pretrained import set_parameters
from llm_numba.models import gpt2 as model
from llm_numba.ops import DEVICES, choose_device, get_ops
from llm_numba.util.cli import Parser, UserError, exit_with

TOLERANCE = 1e-4  # |ours - theirs| / |theirs| of a tensor: float32 leaves some 1e-6, another precision of theirs more
LOSS_TOLERANCE = 1e-3  # of a loss, absolute: ten steps of Adam make more of what rounding left
OPTIMISER = SimpleNamespace(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, grad_clip=0.0)
LEARNING_RATE = 1e-4
# of OpenAI's 124M on llm.c's batch, step by step, as llm.c's test has them
PUBLISHED = (5.270007, 4.059707, 3.375123, 2.800783, 2.315382, 1.849029, 1.394656, 0.999147, 0.624080, 0.376511)
PUBLISHED_LOSS = 5.270007  # that batch's loss tells that it is the one


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|; a NaN on either side is infinitely far."""
    difference = np.linalg.norm(np.subtract(ours, theirs, dtype=np.float64))
    norm = np.linalg.norm(theirs.astype(np.float64))
    found = 0.0 if difference == 0 else difference / norm if norm else np.inf
    return found if np.isfinite(found) else np.inf


def compare(ops, config, parameters, state, losses) -> list[tuple[str, float, float, bool]]:
    """(what, ours or the distance, theirs or the tolerance, whether it agrees) of each thing compared."""
    B, T = state.tokens.shape
    V = config.vocab_size
    arena = Arena(training_groups(config, B, T, ops), config, "reuse", ops)
    m = arena.training()
    set_parameters(ops, arena, parameters.items())
    ops.to_device(m.decays, 1)  # of every tensor, as llm.c's test has it
    ops.to_device(m.batches, np.stack([state.tokens, state.targets])[None])
    ops.to_device(m.learning_rate, LEARNING_RATE)
    ops.to_device(m.limits, np.inf)

    ops.copy(m.tokens, m.batches[0, 0])
    model.forward(ops, m)
    logits = []
    for block in m.blocks:
        model.logits(ops, m, block)
        logits.append(np.array(ops.to_host(block.logits)[..., :V]).reshape(-1, V))
    rows = [("logits", distance(np.concatenate(logits).reshape(B, T, V), state.logits), TOLERANCE)]
    found = []
    for step in range(1, len(losses) + 1 if losses else 2):
        model.gradients(ops, m, V)
        found.append(float(ops.to_host(m.loss)[0]))
        if step == 1:
            for name, theirs in state.gradients.items():
                ours, theirs = ops.to_host(arena.tensors["gradients", "d" + name]), np.asarray(theirs)
                both = (ours[:V], theirs[:V]) if name == "wte" else (ours, theirs)
                rows.append(("d" + name, distance(*both), TOLERANCE))
        ops.to_device(m.step, step)
        model.update(ops, m, OPTIMISER)
    told = [(what, off, tolerance, off <= tolerance) for what, off, tolerance in rows]
    pairs = [("loss", found[0], state.loss)]
    pairs += [
        (f"loss of step {i}", ours, theirs) for i, (ours, theirs) in enumerate(zip(found, losses, strict=False), 1)
    ]
    return told + [(what, ours, theirs, abs(ours - theirs) <= LOSS_TOLERANCE) for what, ours, theirs in pairs]


def read_losses(path: Path) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in path.read_text().replace(",", " ").split())
    except (OSError, ValueError) as error:
        raise UserError(f"--losses {path}: expected a text file of numbers ({error})") from error


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="llm-numba check-llmc", description="Replay llm.c's own acceptance test.")
    parser.add_argument("model", type=Path, metavar="MODEL.bin", help="a model file of llm.c, version 3 or 5")
    parser.add_argument("state", type=Path, metavar="STATE.bin", help="its debug state")
    parser.add_argument(
        "--losses", type=Path, metavar="FILE",
        help="the losses of the steps to train, as numbers in a text; without it: for OpenAI's 124M the ten published",
    )  # fmt: skip
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a CUDA card, or else the CPU")
    args = parser.parse_args(argv)
    config, Vp, parameters = read_model(args.model)
    state = read_state(args.state, config, Vp)
    published = config.num_layers == 12 and abs(state.loss - PUBLISHED_LOSS) < LOSS_TOLERANCE
    losses = read_losses(args.losses) if args.losses else PUBLISHED if published else ()

    rows = compare(get_ops(choose_device(args.device)), config, parameters, state, losses)
    for what, ours, theirs, agrees in rows:
        numbers = (
            f"{ours:.6f}  expected {theirs:.6f}" if what.startswith("loss") else f"{ours:.1e} off, at most {theirs:.0e}"
        )
        print(f"{what:<16} {numbers:<32} {'agrees' if agrees else 'DIFFERS'}")
    wrong = [what for what, _, _, agrees in rows if not agrees]
    if not losses:
        print("no losses to compare a training with: give them with --losses")
    print(f"{len(wrong)} of {len(rows)} differ: {', '.join(wrong)}" if wrong else f"all {len(rows)} agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    exit_with(main)
