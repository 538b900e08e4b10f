"""torchrun, which ends as the rank that failed first has: `python -m gdpo_megatron.agent ...`.

torchrun itself ends with 1 and a long report whatever a rank ended with. A rank that ends with 2
has said in one line what a person has to mend; there is nothing to add to it.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

SAID = 2
"""Exit code of a rank that has said what is wrong."""


def main() -> None:
    """Run torchrun with this process's arguments."""
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    logger.addFilter(lambda record: f"(exitcode: {SAID})" not in record.getMessage())
    try:
        torchrun()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == SAID:
            sys.exit(SAID)
        raise


if __name__ == "__main__":
    main()
