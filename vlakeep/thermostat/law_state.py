"""What a control law has learnt so far, for checkpoints: all fields of its dataclass but the law itself, which the configuration says."""

from dataclasses import asdict


class LawState:
    """Base of a dataclass with a field `law`."""

    def state_dict(self) -> dict:
        state = asdict(self)  # type: ignore[call-overload]  # of the dataclass
        state.pop("law")
        return state

    def load_state_dict(self, state: dict) -> None:
        for key, value in state.items():
            setattr(self, key, list(value) if isinstance(value, list) else value)
