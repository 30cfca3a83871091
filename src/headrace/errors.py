"""The one tree of errors. What a user can mend is a `ConfigError`: one sentence, exit code 2."""


class HeadraceError(Exception):
    """Base of every error that headrace raises on purpose."""


class ConfigError(HeadraceError):
    """Something was wrong before anything started; the message is one sentence with the fix."""


class EnvironmentFault(HeadraceError):
    """An environment broke the Gymnasium contract or raised; names it, the index and the value."""


class TransportError(HeadraceError):
    """A peer (a worker, a native environment, a queue's other end) is gone or late."""


class PeerLost(TransportError):
    """The other end is gone and will not come back."""


class DeadlineExceeded(TransportError):
    """The other end did not answer in time."""


class TrainingDiverged(HeadraceError):
    """A loss or a gradient is not finite; the last good checkpoint is kept."""
