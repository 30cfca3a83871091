"""What --help and --help-all show of a run's settings: grouped by what a user does with them.

What code outside headrace adds, a user's own environment or algorithm, stands in no list here: it
joins the group of its section, and --help shows it too.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple, NoReturn

import tyro

from headrace.config import RunConfig

HELP_WORDS = frozenset({"-h", "--help", "--help-all"})

GROUPS = {
    "run length and output": (
        *("total_frames", "total_minutes", "schedule_frames", "schedule_minutes", "seed", "out"),
        *("checkpoint_interval_s", "keep_checkpoints", "log_interval_s", "tensorboard", "wandb"),
        "lockstep",
    ),
    "learning": (
        *("algorithm", "preset", "discount", "unroll_steps", "batch_unrolls", "burn_in_steps"),
        *("overlap_steps", "passes", "epochs", "minibatches", "clip_range", "clip_range_schedule"),
        *("stop_kl", "value_clip_range", "normalize_advantage", "gae_lambda", "value_cost"),
        *("entropy_cost", "entropy_cost_schedule", "final_entropy_cost", "target_entropy"),
        *("entropy_cost_adjustment_speed", "temperature", "initial_temperature"),
        *("reward_transform", "reward_scale", "n_steps", "full_returns", "rescale_values"),
        *("value_scale_epsilon", "double_q", "target_update_interval", "target_tau"),
        *("policy_delay", "target_noise", "target_noise_clip", "q_lambda"),
        *("vtrace_lambda", "vtrace_lambda_form", "vtrace_rho_max", "vtrace_c_max"),
        *("vtrace_pg_rho_max", "max_policy_lag", "turns", "update_order", "updates_per_call"),
    ),
    "optimizer": (
        *("optimizer", "learning_rate", "learning_rate_schedule", "learning_rate_warmup"),
        *("learning_rate_decay", "target_kl", "max_gradient_norm", "optimizer_eps"),
        *("adam_beta1", "adam_beta2", "muon_momentum", "rmsprop_decay", "momentum"),
        "initial_mean_square",
    ),
    "network": (
        *("network", "lstm_size", "pictures", "hidden_sizes", "activation", "layer_norm"),
        *("heads", "separate_value"),
        *("normalize_observations", "normalize_values", "popart_step", "initial_log_std"),
        *("state_dependent_std", "num_critics", "critic_dropout", "critic_layer_norm"),
    ),
    "environment": (
        *("env", "frame_skip", "frame_stack", "frame_size", "max_pool", "sticky_probability"),
        *("noop_max", "life_loss_ends_episode", "full_action_space", "max_episode_frames"),
        *("resize", "grey", "time_limit", "max_episode_steps", "env_kwargs", "strictness"),
        *("truncate_after", "episode_steps", "delay_steps", "num_cues"),
    ),
    "exploration and replay": (
        *("epsilon_base", "epsilon_power", "epsilon_schedule", "initial_epsilon", "final_epsilon"),
        *("epsilon_decay", "exploration_noise"),
        *("replay_capacity", "replay_gib", "replay_min", "samples_per_insert"),
        *("priority_exponent", "priority_eta", "importance_exponent"),
        *("importance_exponent_schedule", "final_importance_exponent"),
        *("replay_place", "replay_folder", "save_replay"),
    ),
    "machine and speed": (
        *("device", "precision", "compile", "num_envs", "num_workers", "compute_threads"),
        *("env_threads", "pool", "inference", "inference_batch", "groups_per_worker"),
        *("queue_unrolls", "spread_unrolls", "actor_device", "critic_device", "learner_devices"),
        *("inference_devices", "batch_wait_ms", "step_timeout_s", "start_timeout_s"),
        "max_worker_deaths",
    ),
    "watching and evaluation": (
        *("evaluator", "eval_episodes", "eval_interval_s", "eval_envs", "eval_epsilon"),
        *("video_interval_s", "watch", "watch_port", "watch_fps"),
    ),
    "many machines": (
        *("listen", "token_file", "tls_cert", "tls_key", "tls_client_ca", "insecure"),
        *("envs_per_message", "message_compression", "max_hosts", "max_envs_per_host"),
        *("hello_timeout_s", "host_timeout_s", "no_host_timeout_s", "cluster", "cluster_hosts"),
        *("host_cpus", "host_tls_ca", "host_tls_cert", "host_tls_key"),
    ),
}
"""The settings of each group, in the order of the page."""

COMMON = frozenset(
    {
        *("env", "algorithm", "preset", "total_frames", "total_minutes", "seed", "out", "wandb"),
        *("discount", "unroll_steps", "batch_unrolls", "entropy_cost", "learning_rate"),
        *("network", "lstm_size", "frame_stack", "sticky_probability", "env_kwargs"),
        *("truncate_after", "episode_steps", "delay_steps", "num_cues"),
        *("replay_capacity", "samples_per_insert", "device", "num_envs", "num_workers"),
        *("evaluator", "video_interval_s", "watch", "listen"),
    }
)
"""What people change, and so what --help shows; a run has about twenty of them."""

_GROUP_OF = {name: title for title, names in GROUPS.items() for name in names}


class Setting(NamedTuple):
    """One setting as its flag shows it."""

    name: str
    section: str  # of config.toml, the outermost; "" for none
    hint: Any  # its type
    value: Any  # that it would have
    text: str  # what it does; "" if nobody has said

    @property
    def group(self) -> str:
        """Under which title it stands."""
        own = self.section if self.section in GROUPS else "learning"
        return _GROUP_OF.get(self.name, own)

    @property
    def is_common(self) -> bool:
        """Whether --help shows it."""
        return self.name in COMMON or self.name not in _GROUP_OF


def settings_of(section: Any, outermost: str = "") -> Iterator[Setting]:
    """Yields all settings of a config dataclass, those of its sections too."""
    hints = typing.get_type_hints(type(section), include_extras=True)
    texts = field_docs(type(section))
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, outermost or entry.name)
        else:
            text = texts.get(entry.name, "")
            yield Setting(entry.name, outermost, hints[entry.name], value, text)


def field_docs(kind: type[Any]) -> dict[str, str]:
    """Returns the docstring under each field of a class, those that it inherits too, in one line.

    There are none where the source is not at hand.
    """
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):
            continue
        (tree,) = ast.parse(source).body
        for field, below in itertools.pairwise(getattr(tree, "body", ())):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def show_help(
    base: RunConfig,
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    more: type[Any] | None = None,
) -> NoReturn:
    """Prints the settings and ends the process with 0.

    Args:
        base: A complete config: its values are what the page calls defaults.
        argv: Says whether all settings are wanted, by --help-all.
        prog: The command. If it ends in ENV, the page has a place for the environment.
        description: The page's beginning.
        more: What else the command takes, which goes before settings of the same name.
    """
    everything = "--help-all" in argv
    command = prog.removesuffix(" ENV")
    taken = {entry.name for entry in dataclasses.fields(more)} if more else set()
    if command == prog:
        taken.add("env")
    shown = [one for one in settings_of(base) if one.name not in taken]
    page = _page([one for one in shown if everything or one.is_common])
    if more:
        page.insert(0, _section("more", command.split()[-1], more))
    kind: Any = dataclasses.make_dataclass("Page", page, kw_only=True)
    try:
        tyro.cli(
            kind,
            args=["--help"],
            prog=command,
            description=description,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SystemExit:
        if not everything:
            print(f"--help-all shows the other {sum(not one.is_common for one in shown)} settings.")
    sys.exit(0)


def _page(settings: Sequence[Setting]) -> list[tuple[str, Any, Any]]:
    """Returns a field with a section for each group, for `make_dataclass`."""
    order = [name for names in GROUPS.values() for name in names]
    places = {name: place for place, name in enumerate(order)}
    fields: list[tuple[str, Any, Any]] = []
    for number, title in enumerate(GROUPS):
        members = sorted(
            (one for one in settings if one.group == title),
            key=lambda one: places.get(one.name, len(places)),
        )
        if members:
            group = dataclasses.make_dataclass(f"Group{number}", map(_field, members), kw_only=True)
            fields.append(_section(f"group{number}", title, group))
    return fields


def _section(name: str, title: str, kind: Any) -> tuple[str, Any, Any]:
    hint: Any = Annotated[kind, tyro.conf.arg(name=title)]
    return name, hint, dataclasses.field(default_factory=kind)


def _field(setting: Setting) -> tuple[str, Any, Any]:
    hint: Any = Annotated[setting.hint, tyro.conf.arg(help=setting.text)]
    if setting.name == "env":
        shown = tyro.conf.arg(metavar="ENV", help=setting.text)
        hint = Annotated[setting.hint, tyro.conf.Positional, shown]
    return setting.name, hint, dataclasses.field(default_factory=lambda: setting.value)
