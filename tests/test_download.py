"""Archives and downloads: from a server on loopback, and what must not be unpacked."""

import atexit
import contextlib
import hashlib
import http.server
import io
import shutil
import socket
import stat
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest

from deit import errors, teachers
from tests.stand_ins import assert_is_stand_in, build, config, identity

OUTSIDE = Path(tempfile.mkdtemp(prefix="deit-test-"))  # where an absolute member would go
atexit.register(OUTSIDE.rmdir)


def test_a_zip_s_identity_is_its_sha256_and_a_damaged_stream_is_one_line(archive, tmp_path):
    data = archive.read_bytes()
    assert build(kind="saved_model", path=str(archive)).identity == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(archive) as file:
        member = max(file.infolist(), key=lambda info: info.compress_size)
    start = member.header_offset + 30 + len(member.filename)
    for filling in (b"\xff", b"\x00"):
        bad = tmp_path / f"bad{filling[0]}.zip"
        bad.write_bytes(data[:start] + filling * member.compress_size + data[start + member.compress_size :])
        with pytest.raises(errors.UserError, match=r"can't be unpacked as a zip, tar or tar.gz: ") as caught:
            build(kind="saved_model", path=str(bad))
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and p.name.startswith("bad")] == []


def test_a_teacher_file_that_may_not_be_read_is_one_line_with_its_path(archive, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("deit.workdir.describe", denied)
    with pytest.raises(errors.UserError, match=rf"^teacher.path .*{archive} can't be read: Permission denied$"):
        build(kind="saved_model", path=str(archive))
    monkeypatch.undo()
    for call in (build, lambda **teacher: teachers.check(config(**teacher))):
        with pytest.raises(errors.UserError, match=r"^teacher.path .* can't be read: File name too long$"):
            call(kind="saved_model", path=str(archive.parent / ("x" * 300)))


@contextlib.contextmanager
def server(directory, *, cut=0, chunked=False):
    """Serve a directory on loopback, each answer `cut` bytes short; yield (url, paths asked for)."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(directory))

        def do_GET(self):
            requests.append(self.path)
            file = Path(directory) / self.path[1:].partition("?")[0]
            if not file.is_file():
                return self.send_error(404)
            body = file.read_bytes()
            self.send_response(200)
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(f"{len(body):x}\r\n".encode() + body[: len(body) - cut])
                return None
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return self.wfile.write(body[: len(body) - cut])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", requests
        httpd.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_url_is_downloaded_once_and_its_sha256_recorded(zipped, cache):
    with server(zipped.parent) as (url, requests):
        path = f"{url}/{zipped.name}"
        assert_is_stand_in(build(kind="saved_model", path=path))
        assert_is_stand_in(build(kind="saved_model", path=path))
        assert requests == [f"/{zipped.name}"]
    assert_is_stand_in(build(kind="saved_model", path=path))  # and with the server gone
    (record,) = cache.glob("*.sha256")
    assert len(record.read_text().split()[0]) == 64
    assert not list(cache.glob("*.part-*")) + list(cache.glob("*.tmp-*"))


def test_a_download_that_breaks_off_leaves_nothing_and_a_missing_file_says_so(zipped, cache):
    with server(zipped.parent, cut=7) as (url, _):
        with pytest.raises(errors.UserError, match=r"the connection ended after"):
            build(kind="saved_model", path=f"{url}/{zipped.name}")
        with pytest.raises(errors.UserError, match=r"can't be downloaded: HTTP Error 404.*give its path"):
            build(kind="saved_model", path=f"{url}/none.zip")
    assert not list(cache.iterdir())


def test_content_that_changed_since_its_first_use_is_refused(archive):
    assert_is_stand_in(build(kind="saved_model", path=str(archive)))
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("more.txt", "more")
    with pytest.raises(errors.UserError, match=r"changed: its sha256 is"):
        build(kind="saved_model", path=str(archive))


def test_a_pinned_sha256_must_match_before_anything_is_unpacked(archive):
    with pytest.raises(errors.UserError, match=r"teacher.sha256 .0{64}. must be that of"):
        build(kind="saved_model", path=str(archive), sha256="0" * 64)
    assert [file.name for file in archive.parent.iterdir()] == ["teacher.zip"]


def link(name, target):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target


@pytest.mark.parametrize(
    "member", [("../out.txt", "x"), (f"{OUTSIDE}/deit-out.txt", "x"), ("in/../../out.txt", "x"), link("l", "/etc")]
)
def test_zip_members_that_lead_outside_are_refused(tmp_path, member):
    path = tmp_path / "inner" / "evil.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("saved_model.pb", "x")
        file.writestr(*member)
    with pytest.raises(
        errors.UserError, match=r"must be a file or directory with a relative path, no link, no device, no \.\.$"
    ):
        build(kind="saved_model", path=str(path))
    assert not (tmp_path / "out.txt").exists() and not (OUTSIDE / "deit-out.txt").exists()
    assert [file.name for file in path.parent.iterdir() if file.is_dir()] == []


def tar_member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        tar_member("../out.txt"),
        tar_member(f"{OUTSIDE}/deit-out.txt"),
        tar_member("in/../../out.txt"),
        tar_member("in\\..\\..\\out.txt"),
        tar_member("l", tarfile.SYMTYPE, "/etc"),
        tar_member("l", tarfile.LNKTYPE, "../../out.txt"),
        tar_member("d", tarfile.CHRTYPE),
        tar_member("p", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name.replace(str(OUTSIDE), 'OUTSIDE')}-{member.type.decode()}",
)
def test_tar_members_that_lead_outside_or_are_no_files_are_refused(tmp_path, member):
    path = tmp_path / "inner" / "evil.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as file:
        file.addfile(tar_member("saved_model.pb"))
        file.addfile(member)
    with pytest.raises(errors.UserError, match=r"must be a file or directory with a relative path, no link, no device"):
        build(kind="saved_model", path=str(path))
    assert not (tmp_path / "out.txt").exists() and not (OUTSIDE / "deit-out.txt").exists()
    assert [file.name for file in path.parent.iterdir() if file.is_dir()] == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_is_known_by_its_content_whatever_its_name(saved, tmp_path, mode):
    path = tmp_path / "4"  # as a hub's URL ends
    with tarfile.open(path, mode) as file:
        file.add(saved, arcname=".")
    teacher = build(kind="saved_model", path=str(path))
    assert_is_stand_in(teacher)
    assert teacher.identity == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_ends_early_or_is_damaged_is_one_line(saved, tmp_path, mode):
    whole = tmp_path / "whole"
    with tarfile.open(whole, mode) as file:
        file.add(saved, arcname="m")
        file.addfile(tar_member("last"), io.BytesIO())
        start = file.offset
    data = whole.read_bytes()
    cuts = [data[: len(data) // 2]]
    if mode == "w":
        cuts += [data[:start], data[: start - 300] + b"x" * 100 + data[start - 200 :]]  # no end mark, a bad header
    for i, content in enumerate(cuts):
        (tmp_path / f"bad{i}").write_bytes(content)
        with pytest.raises(errors.UserError, match=r"can't be unpacked as a zip, tar or tar.gz: ") as caught:
            build(kind="saved_model", path=str(tmp_path / f"bad{i}"))
        assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == []


def test_a_hub_url_with_a_query_is_downloaded_as_the_archive_that_it_is(saved, tmp_path, cache):
    with tarfile.open(tmp_path / "4", "w:gz") as file:
        file.add(saved, arcname=".")
    with server(tmp_path) as (url, requests):
        teacher = build(kind="saved_model", path=f"{url}/4?tf-hub-format=compressed")
    assert requests == ["/4?tf-hub-format=compressed"]
    assert_is_stand_in(teacher)


def test_a_url_that_cannot_be_reached_is_one_line(cache, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # bound and not listening: refused
        with pytest.raises(
            errors.UserError, match=r"^teacher.path .*t.zip\) can't be downloaded: .*refused.*its path$"
        ):
            build(kind="saved_model", path=f"http://127.0.0.1:{port}/t.zip")

    def unknown(*arguments, **named):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(errors.UserError, match=r"can't be downloaded: .*Name or service not known.*its path$"):
        identity(kind="saved_model", path="http://nowhere.invalid/t.zip")
    assert not list(cache.iterdir())


def test_an_identity_downloads_what_nothing_pins_and_takes_the_pin_until_it_is_there(zipped, cache):
    digest = hashlib.sha256(zipped.read_bytes()).hexdigest()
    with server(zipped.parent) as (url, requests):
        path = f"{url}/{zipped.name}"
        assert identity(kind="saved_model", path=path, sha256="0" * 64) == "0" * 64
        assert requests == []
        assert identity(kind="saved_model", path=path) == digest
        with pytest.raises(errors.UserError, match=r"teacher.sha256 .0{64}. must be that of"):
            identity(kind="saved_model", path=path, sha256="0" * 64)
        assert build(kind="saved_model", path=path, sha256=digest.upper()).identity == digest
    assert requests == [f"/{zipped.name}"]


def test_an_answer_that_breaks_http_s_rules_is_one_line(zipped, cache):
    with server(zipped.parent, cut=7, chunked=True) as (url, _):
        with pytest.raises(errors.UserError, match=r"can't be downloaded: .*IncompleteRead.*give its path"):
            build(kind="saved_model", path=f"{url}/{zipped.name}")
        with pytest.raises(errors.UserError, match=r"can't be downloaded: .*give its path"):
            build(kind="saved_model", path=url.replace("127.0.0.1:", "127.0.0.1:x") + "/t.zip")
    assert not list(cache.iterdir())


def test_a_page_instead_of_an_archive_says_what_to_remove(tmp_path, cache):
    (tmp_path / "page").write_text("<html>sign in</html>")
    said = r"for a new download remove it and \S+page.sha256"
    with server(tmp_path) as (url, _), pytest.raises(errors.UserError, match=said):
        build(kind="saved_model", path=f"{url}/page")


def test_an_archive_that_is_larger_than_the_disk_is_refused_before_it_fills_it(archive, monkeypatch):
    usage = shutil.disk_usage(archive.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(errors.UserError, match=r"unpacks to [\d,]+ bytes, the disk has 100$"):
        build(kind="saved_model", path=str(archive))
    assert not [path for path in archive.parent.iterdir() if path.is_dir()]
