"""Replay of golden cases, recorded batch by batch from official implementations, by this project's own code.

    python tests/replay.py [PATH/TO/lisa PATH/TO/booster ...]

A case is the path of a golden file without its ending. All cases of tests/golden are replayed if none is named. The
JSON of a case names its method. Each case prints one line: its name, and the largest error of each recorded quantity.
The exit status is 1 if an error exceeds the case's tolerance.
"""

import json
import warnings
from pathlib import Path

from safetensors.torch import load_file

from golden.errors import Errors
from golden.repairs import REPAIRS
from golden.rows import marked_rows
from golden.tamper_resistance import resist
from golden.training import selection, token_weights, train

GOLDEN = Path(__file__).parent
TOLERANCES = {
    "booster": 3e-5,
    "kl": 3e-6,
    "ldifs": 5e-5,
    "lox": 3e-6,
    "nlsr": 2e-6,
    "repnoise": 5e-6,
    "sbr": 1e-5,
    "spag": 3e-6,
    "tar": 1e-5,
}
"""Tolerance by method, 1e-6 for others. It is absolute for weights, and relative to max(1, value) for other values.

A loss near 5, recorded in float32 under an older transformers, is reproduced to 1.5e-6 at best, in float64 too.
"""

PARTS = {
    "backdoor_alignment": marked_rows,
    "constrained_sft": token_weights,
    "spard_selection": selection,
    "tar": resist,
}
"""Method -> replay of a case that is no training by this project's module."""
TERM_TOLERANCES = {
    "layer entropies": 1.5e-5,
    "scales": 2e-5,
    **dict.fromkeys(("projection", "start", "residual"), 1e-5),
    **dict.fromkeys(("outer gradient", "all weights"), 1e-4),
}
"""Tolerances of single quantities.

- Layer entropies pass through bfloat16, in which the last bit of a sum can change a rounding.
- Scales are quotients of the difference of a loss and a threshold near it, which leaves few of the recorded digits.
- SaLoRA's start was recorded from singular vectors in float32.
- TAR's outer gradient, and weights that all train by it, contain the roundings of the adversaries' steps.
"""


def replay(case: Path) -> Errors:
    """Replay the recorded batches of `case` (a path without its ending), and return the errors."""
    facts = json.loads(case.with_name(case.name + ".json").read_text())
    tensors = load_file(case.with_name(case.name + ".safetensors"))
    name = facts["method"]
    errors = Errors(TOLERANCES.get(name, 1e-6), TERM_TOLERANCES)
    if name in REPAIRS:
        REPAIRS[name](facts, tensors, errors)
    elif name in PARTS:
        PARTS[name](facts, tensors, errors)
    else:
        train(facts, tensors, errors)
    return errors


def main(cases: list[str]) -> int:
    """Replay cases, print their errors, and return 1 if any case fails."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft's call
    failed = False
    for case in cases or sorted(str(file.with_suffix("")) for file in GOLDEN.glob("*.json")):
        try:
            errors = replay(Path(case))
        except Exception as error:  # which shall not hide what the other cases say
            failed = True
            print(f"{Path(case).name}  FAILED ({type(error).__name__}: {error})")
            continue
        failed |= not errors.passed
        summary = "  ".join(f"{name} {error:.1e}" for name, error in errors.found.items())
        print(
            f"{Path(case).name}  {summary}" + ("" if errors.passed else f"  FAILED (tolerance {errors.tolerance:.0e})")
        )
    return int(failed)
