"""The switches of a quantizer: whether a call quantizes, collects statistics, or does nothing."""


class Switches:
    """``disable`` stops everything; quantizing and collecting are switched on their own."""

    _disabled: bool
    _if_quant: bool
    _if_calib: bool

    def _init_switches(self, disabled: bool, if_quant: bool, if_calib: bool) -> None:
        self._disabled = disabled
        self._if_quant = if_quant
        self._if_calib = if_calib
        self.stands_by = False
        """Whether only other targets than the present one use it; see ``set_stands_by``."""

    @property
    def is_enabled(self) -> bool:
        """Whether a call changes its input."""
        return self._if_quant and not self._disabled and not self.stands_by

    @property
    def is_active(self) -> bool:
        """Whether a call quantizes or collects statistics."""
        return self.is_enabled or self.is_collecting

    @property
    def is_collecting(self) -> bool:
        """Whether a call collects statistics."""
        return self._if_calib and not self._disabled and not self.stands_by

    def disable(self) -> None:
        """Become the identity: neither quantize nor collect."""
        self._disabled = True

    def enable(self) -> None:
        """Undo ``disable``."""
        self._disabled = False

    def disable_quant(self) -> None:
        """Stop quantizing."""
        self._if_quant = False

    def enable_quant(self) -> None:
        """Quantize."""
        self._if_quant = True

    def disable_calib(self) -> None:
        """Stop collecting statistics."""
        self._if_calib = False

    def enable_calib(self) -> None:
        """Collect statistics from every call."""
        self._if_calib = True
