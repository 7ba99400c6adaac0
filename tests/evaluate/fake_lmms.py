"""The few modules of lmms-eval that the adapter uses, with the signatures of its release 0.7.3."""

import abc
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)
    resps: list = field(default_factory=list)

    @property
    def args(self) -> tuple:
        return self.arguments


class CacheHook:
    def __init__(self, cachinglm: Any = None) -> None:
        self.seen: list[tuple] = []

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.seen.append((attr, req, res))


class lmms(abc.ABC):
    is_simple: bool = True

    def __init__(self) -> None:
        self._rank = 0
        self._world_size = 1
        self.cache_hook = CacheHook(None)
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None):
        args = dict(pair.split("=", 1) for pair in arg_string.split(",") if pair)
        return cls(**args, **{k: v for k, v in (additional_config or {}).items() if v is not None})


def install(monkeypatch) -> None:
    """Put the modules where `import lmms_eval...` finds them."""
    holds = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms, "CacheHook": CacheHook},
        "lmms_eval.api.instance": {"Instance": Instance},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, values in holds.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
