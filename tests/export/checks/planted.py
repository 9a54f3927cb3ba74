"""A graph with one fault, and the finding that it has to give."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Planted:
    """One graph with one fault.

    Args:
        severity: of the finding, in small letters.
        check: ``"<rule> <function>"`` of the check that has to fire.
        case: what is special about it.
        words: in the finding's problem.
        text: the graph.
        opset: of the file.
    """

    severity: str
    check: str
    case: str
    words: str
    text: str
    opset: int

    @property
    def rule(self) -> str:
        return self.check.split()[0]

    def __str__(self) -> str:
        return f"{self.check}-{self.case}".replace(" ", "-")


def planted(head: str, text: str, opset: int = 19) -> Planted:
    """Return a fault; ``head`` is ``"<severity> <rule> <function> | <case> | <words of the problem>"``."""
    check, case, words = head.split(" | ")
    severity, check = check.split(" ", 1)
    return Planted(severity, check, case, words, text, opset)
