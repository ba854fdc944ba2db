"""plan.py: what a launch becomes, by tables: environment, current directory, binds, command."""

from __future__ import annotations

from typing import Any, Optional

import pytest

from shifterwrap import plan
from shifterwrap.config import DEFAULT_PATH, Config
from shifterwrap.errors import UsageError
from shifterwrap.plan import Image, Plan, User
from shifterwrap.request import Bind, LaunchRequest

USER = User(2001, 2001, "ada", "users", "/home/ada", "/bin/bash")
IMAGE = Image("/cache/image.sqsh", "squashfs", ("PATH=/bin", "FOO=image"), ("/entry", "e"), ("cmd", "c"), "/work")


def made(
    *, cwd: str = "/home/ada", image: Image = IMAGE, user: User = USER, environ: Optional[dict[str, str]] = None,
    config: Config = Config(), **asked: Any,  # noqa: B008
) -> Plan:
    return plan.make(LaunchRequest("i", **asked), image, config, user, environ or {}, cwd)


# ---- environment


@pytest.mark.parametrize(
    ("host", "image", "overrides", "value"),
    [
        ("h", None, None, "h"),
        (None, "i", None, "i"),
        ("h", "i", None, "i"),
        ("h", "i", "o", "o"),
        ("h", None, "o", "o"),
        ("h", "", None, ""),
        ("h", "i", "", ""),
        (None, None, None, None),
    ],
)
def test_the_later_source_wins(
    host: Optional[str], image: Optional[str], overrides: Optional[str], value: Optional[str]
) -> None:
    sources = [{} if text is None else {"NAME": text} for text in (host, image, overrides)]
    assert plan.environment(sources[0], sources[1], sources[2], USER).get("NAME") == value


WIRE_UP = ["SLURM_PROCID", "SLURM_JOB_ID", "PMI_RANK", "PMI_FD", "PMI2_RANK", "PMIX_RANK", "PALS_RANKID", "PRTE_X",
           "OMPI_COMM_WORLD_RANK", "HYDRA_X", "HYDI_X", "MPI_LOCALRANKID", "HOME"]


@pytest.mark.parametrize("name", WIRE_UP)
def test_an_image_never_sets_what_belongs_to_the_task(name: str) -> None:
    host = {name: "host"}
    expected = USER.home if name == "HOME" else "host"
    assert plan.environment(host, {name: "image"}, {}, USER)[name] == expected
    absent = plan.environment({}, {name: "image"}, {}, USER)
    assert absent.get(name) == (USER.home if name == "HOME" else None)
    assert plan.environment(host, {name: "image"}, {name: "asked"}, USER)[name] == "asked"


@pytest.mark.parametrize("name", ["SLURM", "SLURMX_A", "MY_PMI_RANK", "OMPIX", "HOMEPAGE", "PAL_X", "LDFLAGS", "CONDA"])
def test_names_that_only_look_alike(name: str) -> None:
    assert plan.environment({name: "host"}, {}, {}, USER)[name] == "host"
    assert plan.environment({name: "host"}, {name: "image"}, {}, USER)[name] == "image"


@pytest.mark.parametrize(
    "name",
    ["PATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PYTHONPATH", "PYTHONHOME", "PERL5LIB", "VIRTUAL_ENV",
     "CONDA_PREFIX", "CONDA_SHLVL", "_CE_CONDA", "_CONDA_ROOT", "BASH_ENV", "ENV", "BASH_FUNC_module%%", "_", "PWD",
     "OLDPWD", "SHLVL", "SHIFTERWRAP_CACHE_DIR", "SHIFTERWRAP_CONFIG"],
)
def test_what_stays_on_the_host(name: str) -> None:
    assert plan.is_host_only(name)
    found = plan.environment({name: "/host"}, {}, {}, USER)
    assert found.get(name) == (DEFAULT_PATH if name == "PATH" else None)
    assert plan.environment({name: "/host"}, {name: "/image"}, {}, USER)[name] == "/image"
    assert plan.environment({name: "/host"}, {}, {name: "/asked"}, USER)[name] == "/asked"


@pytest.mark.parametrize("name", ["LANG", "TERM", "USER", "TMPDIR", "OMP_NUM_THREADS", "http_proxy", "EDITOR"])
def test_what_passes(name: str) -> None:
    assert plan.environment({name: "host"}, {}, {}, USER)[name] == "host"


@pytest.mark.parametrize(("home", "seen"), [("/home/ada", "/home/ada"), ("", "/"), ("/", "/")])
def test_home(home: str, seen: str) -> None:
    assert plan.environment({"HOME": "/other"}, {}, {}, USER._replace(home=home))["HOME"] == seen


@pytest.mark.parametrize("item", ["A", "A=", "=B", "A=b=c", "A==", ""])
def test_odd_items_of_an_images_environment(item: str) -> None:
    """An image's Env may hold anything; nothing raises, and the value is what follows the first sign."""
    name, _, value = item.partition("=")
    assert made(image=IMAGE._replace(env=(item,))).env.get(name) == value


def test_site_and_request_override_and_are_told_apart() -> None:
    config = Config(env=("SITE=s", "BOTH=s", "HOME=/site"))
    found = made(config=config, env=(("BOTH", "r"), ("FOO", "r"), ("EMPTY", "")))
    wanted = {"SITE": "s", "BOTH": "r", "FOO": "r", "EMPTY": "", "HOME": "/site"}
    assert {name: found.env[name] for name in wanted} == wanted
    assert found.overrides == set(wanted)


# ---- current directory


def workdirs(cwd: str, **how: Any) -> tuple[str, ...]:
    return made(cwd=cwd, **how).workdirs


def is_bound(cwd: str, **how: Any) -> bool:
    return Bind(cwd, cwd, optional=True) in made(cwd=cwd, **how).base


@pytest.mark.parametrize(
    "cwd",
    ["/usr", "/usr/lib", "/usr/local/src", "/etc", "/etc/x", "/bin", "/sbin/x", "/lib", "/lib32", "/lib64/x", "/libx32",
     "/boot", "/dev", "/proc/self", "/sys/kernel", "/run", "/run/user/2001", "/", "/home", "/root", "/opt", "/srv",
     "/var", "/mnt", "/media"],
)
def test_directories_of_the_operating_system_are_the_images(cwd: str) -> None:
    assert (workdirs(cwd), is_bound(cwd)) == (("/work", "/"), False)


@pytest.mark.parametrize(
    "cwd",
    ["/scratch", "/data/set", "/opt/app", "/srv/x", "/mnt/x", "/root/x", "/home/bob", "/usrlocal", "/etcetera", "/lib6",
     "/var/lib/x", "/tmpx", "/homes", "/runs/1", "/devel", "/home/ada2", "/scratch/a b:c"],
)
def test_other_directories_are_bound_and_kept(cwd: str) -> None:
    assert (workdirs(cwd), is_bound(cwd)) == ((cwd, "/work", "/"), True)


@pytest.mark.parametrize("cwd", ["/home/ada", "/home/ada/x", "/tmp/x", "/var/tmp/x", "/dev/shm/x"])
def test_what_other_binds_bring_is_kept_without_a_bind(cwd: str) -> None:
    assert workdirs(cwd) == (cwd, "/work", "/")
    assert sum(bind.target == cwd for bind in made(cwd=cwd).base) == (cwd == "/home/ada")


@pytest.mark.parametrize("cwd", ["/tmp", "/var/tmp", "/dev/shm"])
def test_scratch_itself_is_kept(cwd: str) -> None:
    assert workdirs(cwd) == (cwd, "/work", "/")


@pytest.mark.parametrize("target", ["/usr/share", "/usr/share/site", "/opt"])
def test_a_bind_of_the_user_makes_its_target_a_place_to_be(target: str) -> None:
    binds = (Bind("/data", target),)
    assert workdirs(target, binds=binds) == (target, "/work", "/")
    assert workdirs(f"{target}/sub", binds=binds) == (f"{target}/sub", "/work", "/")
    assert workdirs(target, config=Config(binds=(f"/data:{target}",))) == (target, "/work", "/")


def test_a_home_that_is_not_mounted_covers_nothing() -> None:
    config = Config(mount_home=False)
    assert made(config=config, cwd="/").base == made(config=config, cwd="/", user=USER._replace(home="")).base
    assert is_bound("/home/ada/x", config=config)


@pytest.mark.parametrize(("given", "fallback"), [("/work", "/work"), ("", "/"), ("relative", "/"), ("/a b", "/a b")])
def test_the_images_working_directory(given: str, fallback: str) -> None:
    image = IMAGE._replace(working_dir=given)
    assert workdirs("/usr", image=image) == (fallback, "/")


def test_a_working_directory_that_was_asked_for() -> None:
    found = made(cwd="/scratch", workdir="/elsewhere")
    assert (found.workdirs, found.strict_workdir) == (("/elsewhere",), True)
    assert Bind("/scratch", "/scratch", optional=True) in found.base
    assert not made().strict_workdir


@pytest.mark.parametrize(
    ("path", "root", "inside"),
    [
        ("/a", "/a", True), ("/a/b", "/a", True), ("/ab", "/a", False), ("/", "/", True), ("/a", "/", True),
        ("/a", "/a/b", False), ("/a/b", "/a/", True), ("/a..", "/a", False), ("/a b/c", "/a b", True),
    ],
)
def test_within_goes_by_components(path: str, root: str, inside: bool) -> None:
    assert plan.within(path, root) is inside


# ---- binds


def test_base_binds() -> None:
    found = {bind.target: bind for bind in made(cwd="/scratch").base}
    assert list(found) == ["/dev", "/proc", "/sys", "/tmp", "/var/tmp", "/etc/resolv.conf", "/etc/hosts",
                           "/etc/localtime", "/home/ada", "/scratch"]
    assert all(bind.source == target for target, bind in found.items())
    assert {target for target, bind in found.items() if bind.readonly} == {path for path in found if "/etc/" in path}
    assert {target for target, bind in found.items() if not bind.optional} == {"/dev", "/proc", "/sys"}


NO_HOME = made(user=USER._replace(home=""), cwd="/").base


@pytest.mark.parametrize("home", ["", "/", "//", "relative", "/bin", "/usr/sbin", "/dev", "/usr/", "/opt", "/tmp"])
def test_homes_that_are_not_bound(home: str) -> None:
    """Daemons' accounts live in directories of the operating system, which are the image's own in a container."""
    found = made(user=USER._replace(home=home), cwd="/")
    assert found.base == NO_HOME
    assert found.env["HOME"] == (home or "/")


@pytest.mark.parametrize(
    ("home", "target"), [("/root", "/root"), ("/home/ada/", "/home/ada"), ("/a/../b", "/b"), ("/opt/x", "/opt/x")]
)
def test_homes_that_are_bound(home: str, target: str) -> None:
    bind = Bind(target, target, optional=True)
    assert made(user=USER._replace(home=home), cwd="/").base == (*NO_HOME, bind)


def test_binds_of_the_site_come_before_the_users() -> None:
    found = made(config=Config(binds=("/s:/t:ro",)), binds=(Bind("/u", "/t"),))
    assert found.binds == (Bind("/s", "/t", True), Bind("/u", "/t"))


# ---- command


@pytest.mark.parametrize(
    ("command", "entrypoint", "argv"),
    [
        ((), None, ("/entry", "e", "cmd", "c")),
        (("x", "y"), None, ("x", "y")),
        (("x",), True, ("/entry", "e", "x")),
        ((), True, ("/entry", "e", "cmd", "c")),
        ((), False, ("cmd", "c")),
        (("x",), False, ("x",)),
    ],
)
def test_command(command: tuple[str, ...], entrypoint: Optional[bool], argv: tuple[str, ...]) -> None:
    assert made(command=command, entrypoint=entrypoint).argv == argv


@pytest.mark.parametrize(
    ("image", "command", "entrypoint"),
    [
        (IMAGE._replace(entrypoint=(), cmd=()), (), None),
        (IMAGE._replace(cmd=()), (), False),
        (IMAGE._replace(entrypoint=("",)), (), None),
        (IMAGE, ("", "x"), None),
    ],
)
def test_nothing_to_run(image: Image, command: tuple[str, ...], entrypoint: Optional[bool]) -> None:
    with pytest.raises(UsageError, match="names no command to run"):
        made(image=image, command=command, entrypoint=entrypoint)


# ---- lines


def test_lines_of_passwd_and_group() -> None:
    assert plan.passwd_line(USER) == "ada:x:2001:2001:ada:/home/ada:/bin/bash\n"
    assert plan.passwd_line(USER._replace(home="", shell="")) == "ada:x:2001:2001:ada:/:/bin/sh\n"
    assert plan.group_line(USER) == "users:x:2001:\n"


def test_describe() -> None:
    binds = (Bind("/a", "/b", True),)
    found = made(cwd="/scratch", binds=binds, writable_tmpfs=True, env=(("X", "a'b"),), environ={"TERM": "xt"})
    lines = plan.describe(found, {"TERM": "xt", "FOO": "host"})
    assert lines[0] == "image squashfs /cache/image.sqsh writable-tmpfs"
    assert "bind /tmp /tmp rw if-present" in lines
    assert "bind /dev /dev rw" in lines
    assert "bind /a /b ro" in lines
    assert [line for line in lines if line.startswith("env ")] == [
        "env FOO='image'", "env HOME='/home/ada'", "env PATH='/bin'", 'env X="a\'b"',
    ]
    assert lines[-1] == "workdir /scratch:/work:/"
