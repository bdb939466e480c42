"""Configuration: which source wins, what is refused and how it says so."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tierd.config import KEYS, POLICIES, SECTIONS, VARIABLES, Config
from tierd.core.policies import DEFAULTS, SERVING
from tierd.errors import Invalid

EXAMPLE = Path(__file__).parents[2] / "systemd/tierd.toml"
USER = 12_345


def load(text: str = "", flags: dict[str, str] | None = None, tmp_path: Path | None = None, **environ: str) -> Config:
    """A configuration from a file's text, flags and environment, without anything of the machine's."""
    file = None
    if tmp_path:
        file = tmp_path / "tierd.toml"
        file.write_text(text)
    return Config.load(flags, {"HOME": "/home/u", **environ}, file, USER)


def test_nothing_needs_to_be_set() -> None:
    """An unprivileged user without any configuration gets the documented defaults."""
    config = Config.load({}, {"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/7"}, None, USER)
    assert (config.cpu.bytes, config.nvme.bytes, config.server.socket_mode) == (1 << 30, 4 << 30, 0o660)
    assert config.server.socket == Path("/run/user/7/tierd/tierd.sock")
    assert config.nvme.path == Path("/home/u/.local/state/tierd/nvme")


def test_root_lives_in_run_and_var_lib() -> None:
    """Root's directories are the system's, whatever XDG says."""
    config = Config.load({}, {"XDG_RUNTIME_DIR": "/run/user/0", "HOME": "/root"}, None, 0)
    assert (config.server.runtime_dir, config.server.state_dir) == (Path("/run/tierd"), Path("/var/lib/tierd"))


def test_flags_beat_environment_beats_file(tmp_path: Path) -> None:
    """Each source overrides the one below, key by key."""
    text = '[cpu]\nbytes = "2GiB"\nsegment_bytes = "1MiB"\nhuge_pages = "off"'
    environ = {"TIERD_CPU_BYTES": "3GiB", "TIERD_CPU_SEGMENT_BYTES": "2MiB"}
    config = load(text, {"--cpu-bytes": "4GiB"}, tmp_path, **environ)
    assert (config.cpu.bytes, config.cpu.segment_bytes, config.cpu.huge_pages) == (4 << 30, 2 << 20, "off")


def test_the_users_file_is_found_by_xdg(tmp_path: Path) -> None:
    """A user's own file is read without being named."""
    (tmp_path / "tierd").mkdir()
    (tmp_path / "tierd/tierd.toml").write_text("[limits]\nsessions_max = 65")
    config = load(XDG_CONFIG_HOME=str(tmp_path))
    assert config.limits.sessions_max == 65
    assert config.file == tmp_path / "tierd/tierd.toml"


def test_every_key_can_be_set_by_its_variable() -> None:
    """A variable with the value that `describe` shows gives the same configuration again."""
    described = load().describe()
    environ = {name: str(described[dotted]) for name, dotted in VARIABLES.items() if dotted != "server.domains"}
    assert Config.load({}, {"HOME": "/home/u", **environ}, None, USER) == load()


def test_sizes_take_units_and_integers(tmp_path: Path) -> None:
    """`bytes` is a number of bytes or a string with a binary unit."""
    assert load('[cpu]\nbytes = "512MiB"', tmp_path=tmp_path).cpu.bytes == 512 << 20
    assert load("[cpu]\nbytes = 536870912", tmp_path=tmp_path).cpu.bytes == 512 << 20


def test_nvme_bytes_of_zero_means_no_disk_tier() -> None:
    """0 is allowed for nvme alone."""
    assert load(TIERD_NVME_BYTES="0").nvme.bytes == 0
    with pytest.raises(Invalid, match=r"cpu\.bytes = '0' must be"):
        load(TIERD_CPU_BYTES="0")


def test_the_policies_that_can_be_set_are_those_that_serve() -> None:
    """The core's names and defaults, which configuration may not import."""
    config = load()
    assert POLICIES == SERVING
    assert {"gpu": config.gpu.policy, "cpu": config.cpu.policy, "nvme": config.nvme.policy} == DEFAULTS


def test_only_chd_can_turn_blocks_away() -> None:
    """Admission by policy is refused beside one that lets everything in."""
    with pytest.raises(Invalid, match=r"nvme\.admission = policy .* with nvme\.policy = lru .* set nvme\.policy = chd"):
        load(TIERD_NVME_ADMISSION="policy")
    assert load(TIERD_NVME_ADMISSION="policy", TIERD_NVME_POLICY="chd").nvme.admission == "policy"


def test_domains_map_users_to_names(tmp_path: Path) -> None:
    """A table in TOML and pairs in text mean the same."""
    table = load('[server.domains]\n1000 = "a"\n1001 = "b"', tmp_path=tmp_path)
    assert table.server.domains == load(TIERD_SERVER_DOMAINS="1000=a,1001=b").server.domains == {"1000": "a", "1001": "b"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[cpu]\nbyts = 5", r"cpu\.byts = 5 is no key of tierd: did you mean cpu\.bytes\?"),
        ('[gpu]\ndevice = "cuda"', r"gpu\.device = 'cuda' must be 'cpu', a GPU by its number, such as 'cuda:0', or several"),
        ('[gpu]\ndevice = "cuda:0,cpu:1"', r"gpu\.device = 'cuda:0,cpu:1' must be 'cpu', a GPU by its number"),
        ('[gpu]\ndevice = "cuda:1,cuda:0,cuda:1"', r"gpu\.device = 'cuda:1,cuda:0,cuda:1' must name each device once"),
        ("[storage]", r"storage = \{\} is no key of tierd: the sections are server, gpu"),
        ("[log]\nzzz = 1", r"log\.zzz = 1 is no key of tierd: the keys of \[log\] are level, format"),
        ("cpu = 5", r"cpu = 5 is no key of tierd"),
        ('[cpu]\nbytes = "1.5GiB"', r"cpu\.bytes = '1\.5GiB' must be a number of bytes, or a string with a unit"),
        ('[cpu]\nbytes = "5GB"', r"cpu\.bytes = '5GB' must be .* such as '512MiB'"),
        ("[cpu]\nbytes = -1", r"cpu\.bytes = -1 must be"),
        ("[cpu]\nbytes = true", r"cpu\.bytes = True must be"),
        ("[cpu]\nbytes = 100", r"cpu\.bytes = 100 must be from 64KiB to 1024TiB"),
        (
            '[cpu]\nsegment_bytes = "65537"',
            r"cpu\.segment_bytes = '65537' must be from 64KiB to 64GiB in steps of 4KiB",
        ),
        ('[cpu]\nhuge_pages = "yes"', r"cpu\.huge_pages = 'yes' must be 'auto' or 'off' or 'require'"),
        ("[nvme]\nwrite_back = 1", r"nvme\.write_back = 1 must be true or false"),
        ('[cpu]\npolicy = "arc"', r"cpu\.policy = 'arc' must be 'lru' or 'lfu' or 'chd'"),
        ('[nvme]\nadmission = "some"', r"nvme\.admission = 'some' must be 'everything' or .* 'learned' or 'policy'"),
        ("[nvme]\nio_threads = 0", r"nvme\.io_threads = 0 must be an integer from 1 to 64"),
        ("[nvme]\nio_threads = 1.0", r"nvme\.io_threads = 1\.0 must be an integer"),
        ("[nvme]\nprobe_seconds_max = nan", r"nvme\.probe_seconds_max = nan must be a number from 0\.1 to 600"),
        ('[nvme]\npath = "disk"', r"nvme\.path = 'disk' must be an absolute path"),
        ("[server]\nsocket_mode = 0o660", r"server\.socket_mode = 432 must be a string of octal digits"),
        ('[server]\nsocket_mode = "0060"', r"server\.socket_mode = '0060' must be .* lets the owner"),
        ('[server.domains]\n1000 = "uid:0"', r"server\.domains = .* must map user ids to names that do not begin"),
        ('[server.domains]\nroot = "a"', r"server\.domains = .* must map user ids"),
        ('[metrics]\nlisten = "0.0.0.0:9475"', r"metrics\.listen = '0\.0\.0\.0:9475' must be host:port on loopback"),
        ('[metrics]\nlisten = "127.0.0.1:99999"', r"metrics\.listen = .* must be host:port"),
        ('[metrics]\nlisten = "127.0.0.1"', r"metrics\.listen = .* must be host:port"),
        (
            "[limits]\nsessions_per_namespace_max = 65",
            r"limits\.sessions_per_namespace_max = 65 must be an integer from 1 to 64",
        ),
        ("[policy]\npromotion_window_share = 0", r"policy\.promotion_window_share = 0 must be a number from"),
        ("[cpu\n", r"is not TOML in UTF-8"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_key_value_and_remedy(tmp_path: Path, text: str, says: str) -> None:
    """The message begins with the file and says what is wrong with which value."""
    with pytest.raises(Invalid, match=f"{re.escape(str(tmp_path))}/tierd.toml: {says}"):
        load(text, tmp_path=tmp_path)


def test_a_wrong_variable_is_refused_by_its_name() -> None:
    """Impossible values and unknown names in the environment name the variable."""
    with pytest.raises(Invalid, match=r"^environment variable TIERD_CPU_BYTES: cpu\.bytes = 'big' must be"):
        load(TIERD_CPU_BYTES="big")
    with pytest.raises(Invalid, match=r"TIERD_CPU_BYTE = '1GiB' .* did you mean TIERD_CPU_BYTES"):
        load(TIERD_CPU_BYTE="1GiB")
    with pytest.raises(Invalid, match=r"TIERD_LOG_COLOUR = 'red'"):
        load(TIERD_LOG_COLOUR="red")


def test_variables_of_others_are_left_alone() -> None:
    """The client's variable and those that an orchestrator makes up are no mistakes."""
    assert load(TIERD_SOCKET="/x/tierd.sock", TIERD_PORT="tcp://10.0.0.1:80") == load()


def test_a_wrong_flag_is_refused_by_its_name() -> None:
    """Both forms of flags name themselves."""
    with pytest.raises(Invalid, match=r"^flag --cpu-bytes: cpu\.bytes = 'x' must be"):
        load(flags={"--cpu-bytes": "x"})
    with pytest.raises(Invalid, match=r"^flag --set: nvme\.byte = '1' is no key of tierd: did you mean nvme\.bytes"):
        load(flags={"nvme.byte": "1"})


def test_a_relative_path_in_a_flag_is_taken_from_here() -> None:
    """A shell completes relative paths, so flags take them; files and variables do not."""
    assert load(flags={"--state-dir": "here"}).server.state_dir == Path.cwd() / "here"
    with pytest.raises(Invalid, match="must be an absolute path"):
        load(TIERD_SERVER_STATE_DIR="here")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            {"cpu.bytes": "1MiB"},
            r"cpu\.segment_bytes = 64MiB \(default\) is over cpu\.bytes = 1MiB \(flag --set\): lower the",
        ),
        ({"nvme.bytes": "1MiB"}, r"nvme\.segment_bytes = 64MiB \(default\) is over nvme\.bytes"),
        ({"limits.hello_frame_bytes_max": "1MiB", "limits.frame_bytes_max": "64KiB"}, r"hello_frame_bytes_max = 1MiB"),
        ({"limits.frame_bytes_max": "64KiB"}, r"blocks_per_request_max = 32768 \(default\) times 33 bytes is over"),
        ({"--runtime-dir": "/" + "x" * 100}, r"server\.socket = /x+/tierd\.sock .* has 112 bytes, .* at most 107"),
        ({"server.admin_socket": "/a/s", "server.socket": "/a/s"}, r"server\.socket = /a/s .* is also server\.admin_"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_with_both_values(flags: dict[str, str], says: str) -> None:
    """A rule over two keys names both, their values and where they come from."""
    with pytest.raises(Invalid, match=says):
        load(flags=flags)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A file that was named must be there, be text and be small."""
    with pytest.raises(Invalid, match=r"none\.toml: cannot be read \(No such file or directory\)"):
        Config.load({}, {}, tmp_path / "none.toml", 0)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(Invalid, match="is not TOML in UTF-8"):
        Config.load({}, {}, tmp_path / "binary", 0)
    (tmp_path / "huge").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(Invalid, match="over the maximum of 1MiB"):
        Config.load({}, {}, tmp_path / "huge", 0)


def test_the_example_file_has_every_key_with_its_default(tmp_path: Path) -> None:
    """Uncommented, systemd/tierd.toml is what root gets without any file; and no key is missing or repeated there."""
    text = EXAMPLE.read_text()
    uncommented = re.sub(r"^#(\w+ = .*)$", r"\1", text, flags=re.MULTILINE)
    file = tmp_path / "tierd.toml"
    file.write_text(uncommented)
    assert Config.load({}, {}, file, 0).describe() == Config.load({}, {}, None, 0).describe()
    assert len(re.findall(r"^#(\w+) = ", text, flags=re.MULTILINE)) == len(KEYS)
    for section in SECTIONS:
        body = uncommented.split(f"\n[{section}]\n")[1].split("\n[")[0]
        names = re.findall(r"^(\w+) = ", body, flags=re.MULTILINE)
        assert names == [dotted.partition(".")[2] for dotted in KEYS if dotted.startswith(f"{section}.")]


def test_prepare_makes_directories_that_only_we_can_write(tmp_path: Path) -> None:
    """All three directories exist afterwards, and a second start finds them good."""
    config = load(flags={"--runtime-dir": f"{tmp_path}/r", "--state-dir": f"{tmp_path}/s/deep"})
    config.prepare()
    config.prepare()
    modes = [path.stat().st_mode & 0o022 for path in (tmp_path / "r", tmp_path / "s/deep", tmp_path / "s/deep/nvme")]
    assert modes == [0, 0, 0]


def test_prepare_refuses_a_directory_that_others_can_write(tmp_path: Path) -> None:
    """Whoever can write there could put another socket in place of ours."""
    os.chmod(tmp_path, 0o777)
    with pytest.raises(Invalid, match=r"server\.runtime_dir = .* with mode 0777: it must be .* not writable by others"):
        load(flags={"--runtime-dir": str(tmp_path), "--state-dir": f"{tmp_path}/s"}).prepare()


def test_prepare_refuses_a_memory_tier_that_the_machine_cannot_hold(tmp_path: Path) -> None:
    """More than all memory is an impossible value."""
    with pytest.raises(Invalid, match=r"cpu\.bytes = 512TiB is over this machine's memory of"):
        load(flags={"--runtime-dir": str(tmp_path), "--cpu-bytes": "512TiB"}).prepare()


def test_every_device_has_the_bytes_of_the_gpu_tier(tmp_path: Path) -> None:
    """Memory and descriptors are counted for each; a GPU's memory is not this machine's."""

    def on(device: str, **flags: str) -> Config:
        sizes = {"gpu.bytes": "4GiB", "gpu.segment_bytes": "1GiB", "cpu.bytes": "2GiB", "cpu.segment_bytes": "1GiB"}
        return Config.load(sizes | {"gpu.device": device} | flags, {"HOME": "/home/me"}, tmp_path / "none", uid=1000)

    (tmp_path / "none").touch()
    assert (on("cpu").gpu.host_bytes, on("cpu").memory_segments) == (4 << 30, 6)
    assert (on("cpu:0,cpu:1").gpu.host_bytes, on("cpu:0,cpu:1").memory_segments) == (8 << 30, 10)
    eight = on(",".join(f"cuda:{number}" for number in range(8)))
    assert (eight.gpu.host_bytes, eight.memory_segments, len(eight.gpu.gpus)) == (0, 34, 8)
    assert not on("cuda:0,cuda:1", **{"gpu.bytes": "0"}).gpu.devices


def test_a_fallback_in_tmp_that_belongs_to_another_is_refused() -> None:
    """Without XDG_RUNTIME_DIR the sockets go to /tmp, where anybody may have made the directory first."""
    if os.getuid() != 0:
        pytest.skip("only root can make a directory that belongs to another user")
    user = 54_321_000 + os.getpid()
    theirs = Path(f"/tmp/tierd-{user}")
    theirs.mkdir(mode=0o700)
    try:
        with pytest.raises(Invalid, match=f"does not belong to uid {user}: set XDG_RUNTIME_DIR"):
            Config.load({}, {"HOME": "/home/u"}, None, user)
    finally:
        theirs.rmdir()


def test_the_description_is_plain_and_complete() -> None:
    """Every key once, with units, as something that JSON can carry."""
    described = load().describe()
    assert set(described) == set(KEYS)
    assert (described["cpu.bytes"], described["server.socket_mode"]) == ("1GiB", "0660")
