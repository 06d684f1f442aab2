#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
#
# /// script
# requires-python = ">=3.8"
# dependencies = ["inotify_simple", "pytest", "hypothesis"]
# ///
"""The promises of file_replicator, kept or broken by real processes: real shells, a real sshd, a real container, real git.

The connection command is where faults are made: a host that misbehaves is a command that misbehaves. Nothing is mocked
and nothing waits a fixed time: `until` polls, with a deadline. A tool that is missing skips its tests and says so;
REQUIRE_ALL=1 makes that a failure.
"""

import ast
import atexit
import collections
import concurrent.futures
import contextlib
import functools
import gc
import glob
import inspect
import itertools
import os
import pty
import pwd
import py_compile
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.environ.get('FILE_REPLICATOR', os.path.join(HERE, 'file_replicator.py'))
sys.path.insert(0, os.path.dirname(SCRIPT))
os.environ.pop('PYTHONUNBUFFERED', None)        # it hides what is still to be written when the program ends
import file_replicator as fr            # noqa: E402

SHELLS = ['bash', 'dash', 'busybox sh', 'mksh', 'zsh', 'ksh93', 'yash']


def need(tool):
    """The path of a tool; without it the test is skipped, or with REQUIRE_ALL=1 fails."""
    found = shutil.which(tool) or shutil.which(tool, path='/usr/sbin:/sbin')
    if not found:
        (pytest.fail if os.environ.get('REQUIRE_ALL') == '1' else pytest.skip)('%s is not installed' % tool)
    return found


def tree_of(root, whole_seconds=False):
    """{path: (kind, mode, mtime, bytes or link target)} of all that is in a directory, and of itself as '.'."""
    out = {}
    for directory, directories, files in os.walk(root):
        for name in directories + files + ['']:
            path = os.path.join(directory, name) if name else directory
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = os.lstat(path)
                kind = stat.S_IFMT(status.st_mode)
                mtime = status.st_mtime_ns // (10**9 if whole_seconds else 1)
                what = b''
                if stat.S_ISLNK(kind):
                    what = os.readlink(path)
                elif stat.S_ISREG(kind):
                    with open(path, 'rb') as file:
                        what = file.read()
                out[os.path.relpath(path, root)] = kind, stat.S_IMODE(status.st_mode), mtime, what
    return out


def difference(a, b, whole_seconds=False):
    """What differs between two directories, in words; empty when they are the same."""
    one, two = tree_of(a, whole_seconds), tree_of(b, whole_seconds)
    return ['%r: %s here, %s there%s' % (path, one.get(path, ('nothing',))[:3], two.get(path, ('nothing',))[:3],
                                         '' if (one.get(path) or '...-')[3] == (two.get(path) or '...+')[3] else ', bytes differ')
            for path in sorted(set(one) | set(two)) if one.get(path) != two.get(path)]


def until(check, within=20.0, message=None):
    """Polls until `check()` is true, and returns that; fails after so many seconds. `message()` is added then."""
    end = time.monotonic() + within
    while True:
        result = check()
        if result:
            return result
        if time.monotonic() > end:
            pytest.fail('not within %g seconds%s' % (within, ': %s' % (message(),) if message else ''))
        time.sleep(0.02)


def until_equal(a, b, within=30.0, whole_seconds=False, running=None):
    def message():
        log = '\n' + running.log()[-3000:] if running else ''
        return '\n'.join(difference(a, b, whole_seconds)[:12]) + log
    until(lambda: (os.path.isdir(b) and not difference(a, b, whole_seconds))
          or (running and running.process.poll() is not None and pytest.fail('it ended: ' + running.log()[-3000:])),
          within, message)


@functools.lru_cache(maxsize=None)
def compiled(path):
    """The same program as Python compiled it, which is half of what a short run takes."""
    directory = tempfile.mkdtemp(prefix='fr-compiled.')
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return py_compile.compile(path, os.path.join(directory, 'file_replicator.pyc'), doraise=True)


def command(*words):
    return [sys.executable, compiled(SCRIPT), *map(str, words)]


def once(*words, timeout=60, env=None, expect=0):
    """Runs the program to its end. Returns the CompletedProcess, its output as text."""
    done = subprocess.run(command(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=timeout, env=dict(os.environ, **(env or {})), start_new_session=True)
    done.stdout, done.stderr = (text.decode(errors='backslashreplace') for text in (done.stdout, done.stderr))
    assert 'Traceback' not in done.stderr, done.stderr
    if expect is not None:
        assert done.returncode == expect, (done.returncode, done.stdout[-2000:], done.stderr[-3000:])
    return done


class Running:
    """The program, watching, as a process of its own; `with` ends it and everything it started. Its words are in
    out() (standard output), err() (standard error) and log() (both)."""

    def __init__(self, tmp, *words, env=None, wait=True, cwd=None):
        self.paths = [os.path.join(str(tmp), 'run.%d.%s' % (time.monotonic_ns(), kind)) for kind in ('out', 'err')]
        with open(self.paths[0], 'wb') as out, open(self.paths[1], 'wb') as err:
            self.process = subprocess.Popen(command(*words), stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd,
                                            env=dict(os.environ, **(env or {})), start_new_session=True)
        if wait:
            self.in_step()

    def read(self, path):
        with open(path, 'rb') as file:
            return file.read().decode(errors='backslashreplace')

    def out(self):
        return self.read(self.paths[0])

    def err(self):
        return self.read(self.paths[1])

    def log(self):
        return self.out() + self.err()

    def says(self, words, within=30.0):
        until(lambda: words in self.log() or (self.process.poll() is not None and words not in self.log()
                                              and pytest.fail('it ended without saying %r: %s' % (words, self.log()[-3000:]))),
              within, lambda: '%r was not said: %s' % (words, self.log()[-3000:]))

    def in_step(self, times=1, within=60.0):
        until(lambda: self.out().count('in step') >= times or self.process.poll() is not None, within, self.log)
        assert self.process.poll() is None, self.log()[-3000:]

    def connections(self):
        """The process ids of the connection commands."""
        with open('/proc/%d/task/%d/children' % (self.process.pid, self.process.pid)) as file:
            children = [int(pid) for pid in file.read().split()]
        with contextlib.suppress(OSError):
            children = [pid for pid in children if os.path.basename(os.readlink('/proc/%d/exe' % pid)) != 'git']
        return children

    def cut(self):
        """Kills the connection command, as a network or a container can."""
        for pid in self.connections():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self, number=signal.SIGTERM, within=5.0):
        self.process.send_signal(number)
        return self.process.wait(within)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert 'Traceback' not in self.err(), self.err()


def write(path, data=b'', mode=None, mtime_ns=None):
    """Makes a file and the directories above it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
        file.write(data if isinstance(data, bytes) else data.encode())
    if mode is not None:
        os.chmod(path, mode)
    if mtime_ns is not None:
        os.utime(path, ns=(mtime_ns, mtime_ns))


def shell_command(tmp, shell):
    """A connection command whose far side really runs the receiver in this shell: its PATH begins with a directory where
    sh and dash are that shell, and where there is no standalone busybox to change to (but for busybox itself)."""
    words = shell.split()
    real = need(words[0])
    shims = os.path.join(str(tmp), 'shims-' + words[0])
    os.makedirs(shims, exist_ok=True)
    if shell == 'busybox sh':
        return ['busybox', 'sh']
    for name in ('sh', 'dash'):
        if not os.path.lexists(os.path.join(shims, name)):
            os.symlink(real, os.path.join(shims, name))
    if not os.path.exists(os.path.join(shims, 'busybox')):      # another run may be starting it just now
        write(os.path.join(shims, 'busybox'), '#!%s\nexit 1\n' % need('bash'), 0o755)
    return ['env', 'PATH=%s:%s' % (shims, os.environ['PATH']), real]


def busybox_without_tar(path):
    """A busybox that lacks that applet, by whatever way it is asked for: it has another name in its table."""
    with open(need('busybox'), 'rb') as file:
        data = file.read()
    assert data.count(b'\0tail\0tar\0') == 1
    write(path, data.replace(b'\0tail\0tar\0', b'\0tail\0taq\0'), 0o755)
    return path


def busybox_root(directory, without=()):
    """A root that holds nothing but busybox and its links. There are no links to the applets in `without`, and tar is not in
    it at all."""
    busybox = os.path.join(directory, 'bin', 'busybox')
    os.makedirs(os.path.join(directory, 'bin'), exist_ok=True)
    if 'tar' in without:
        busybox_without_tar(busybox)
    else:
        shutil.copy(need('busybox'), busybox)
    for name in subprocess.run([busybox, '--list'], stdout=subprocess.PIPE, check=True).stdout.decode().split():
        if name not in without and name != 'busybox':
            with contextlib.suppress(FileExistsError):
                os.symlink('busybox', os.path.join(directory, 'bin', name))
    for name in ('tmp', 'srv', 'dev', 'root'):
        os.makedirs(os.path.join(directory, name), exist_ok=True)
    null = os.path.join(directory, 'dev', 'null')
    if not os.path.exists(null):
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    zero = os.path.join(directory, 'dev', 'zero')
    if not os.path.exists(zero):
        os.mknod(zero, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    return directory


# ==== The README ==============================================================================================

def readme():
    with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as file:
        return file.read()


def test_the_help_in_the_readme_is_what_help_prints():
    printed = subprocess.run(command('--help'), stdout=subprocess.PIPE, check=True).stdout.decode()
    assert '```\n' + printed.rstrip() + '\n```' in readme()


def test_every_test_the_readme_names_is_here():
    promised = set(re.findall(r'`(test_\w+)`', readme()))
    with open(os.path.join(HERE, os.path.basename(__file__)), encoding='utf-8') as file:
        here = set(re.findall(r'^def (test_\w+)', file.read(), re.M))
    assert len(promised) > 10 and promised <= here


def test_every_verb_of_the_receiver_is_in_the_readme_and_described_above_its_function():
    verbs = re.findall(r'^do_(\w+)\(\)', fr.RECEIVER, re.M)
    described = dict(re.findall(r'^# ([a-z]+)[A-Z ]*: (?:.*\n#)*.*\ndo_(\w+)\(\)', fr.RECEIVER, re.M))
    assert verbs and all('`%s`' % verb in readme() and described.get(verb) == verb for verb in verbs)


def test_the_messages_the_readme_explains_are_those_of_the_program():
    with open(SCRIPT, encoding='utf-8') as file:
        program = file.read()
    for words in ('ended with status', 'what answers is no shell', 'goes through a terminal', 'no shell answered within',
                  'fs.inotify.max_user_watches', 'the replica was changed over there', 'git cannot say what to leave out'):
        assert words in program and words in readme()


# ==== The file itself =======================================================================================

SH_NAMES = [
    b'plain', b'new\nline', b'\n', b'a\n\nb', b'ends\n', b' lead', b'trail ', b'\ttab\t', b'back\\slash',
    b'\\', b'-rf', b"q'uote", b'"', b'$(touch pwned)', b'`x`', b'*', b'[b]', b'~', b'#', b'a=b', b'\xff\xfe',
    b'e' * 255
]


def names_for(shell):
    """yash takes what is no character of the locale for an error."""
    return [name for name in SH_NAMES if shell != 'yash' or name.isascii()]


def run_sh(shell, text, stdin=b'', cwd=None):
    """Runs shell commands in this shell under the name sh, as a far side does; returns what it printed."""
    with open(os.path.join(str(cwd), 'stdin') if cwd else os.devnull, 'w+b' if cwd else 'rb') as file:
        if cwd:
            file.write(stdin)
            file.seek(0)
        done = subprocess.run(['sh', '-c', text],
                              executable=need(shell.split()[0]),
                              stdin=file,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE,
                              cwd=str(cwd or '/'),
                              timeout=30,
                              env=dict(os.environ, LC_ALL='C'))
    assert not done.stderr, done.stderr
    return done.stdout


def syntax():
    with open(SCRIPT, encoding='utf-8') as file:
        return ast.parse(file.read())


def test_it_imports_the_standard_library_and_inotify_simple_only():
    imported = set()
    for node in ast.walk(syntax()):
        if isinstance(node, ast.Import):
            imported.update(name.name.partition('.')[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or '').partition('.')[0])
    standard = getattr(sys, 'stdlib_module_names', None)        # since 3.10
    if standard is None:
        pytest.skip('this Python does not know the names of its standard library')
    assert imported - set(standard) == {'inotify_simple'}


@pytest.mark.parametrize('path', [SCRIPT, inspect.getsourcefile(need)], ids=os.path.basename)
def test_it_declares_what_it_needs_so_that_uv_can_run_it(path):
    with open(path, encoding='utf-8') as file:
        text = file.read()
    block = re.search(r'^# /// script\n((?:#(?: .*)?\n)+?)# ///$', text, re.MULTILINE)
    assert block and '# requires-python = ">=3.8"' in block.group(1) and '"inotify_simple"' in block.group(1)


def test_no_line_of_it_is_longer_than_110_columns():
    with open(SCRIPT, encoding='utf-8') as file:
        long = [
            '%d: %d columns' % (number, len(line) - 1) for number, line in enumerate(file, 1)
            if len(line) > 111
        ]
    assert not long, long


def test_the_receiver_is_never_formatted_but_sent_as_it_stands():
    for node in ast.walk(syntax()):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            assert getattr(node.left, 'id', '') != 'RECEIVER'
        if isinstance(node, ast.Attribute):
            assert getattr(node.value, 'id', '') != 'RECEIVER', 'RECEIVER.%s' % node.attr
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'RECEIVER':
            assert isinstance(node.value, ast.Constant)
    assert once('--receiver').stdout == fr.RECEIVER


def test_shellcheck_finds_nothing_in_the_receiver():
    done = subprocess.run([need('shellcheck'), '-s', 'sh', '-'],
                          input=fr.RECEIVER.encode(),
                          stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize('shell', SHELLS)
def test_every_shell_parses_the_receiver(shell):
    done = subprocess.run([need(shell.split()[0]), *shell.split()[1:], '-n'], input=fr.RECEIVER.encode(),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout        # ksh93 has advice about speed


# ==== The plan, as a pure function ==========================================================================

TIMES = [10**18, 10**18 + 5, 2 * 10**18, -10**9]


def random_entry(rng, inode, kinds='fffdddl'):
    kind = rng.choice(kinds)
    return fr.Entry(kind, 0o777 if kind == 'l' else rng.choice([0o644, 0o755, 0o600, 0o555]),
                    rng.choice([0, 1, 5]) if kind == 'f' else 0, rng.choice(TIMES),
                    rng.choice(['x', 'y']) if kind == 'l' else '', inode, inode[1] if inode else 0)


def random_local(rng):
    """A tree as a look would find it: each entry has an inode; some files are hard links of each other."""
    tree = fr.Tree()
    tree.put('', fr.Entry('d', 0o755, 0, 10**18, '', (1, 1)))
    linked = fr.Entry('f', 0o644, 5, 10**18, '', (1, 99))
    for number in range(rng.randrange(9)):
        above = rng.choice(sorted(tree.inside))
        path = (above + '/' if above else '') + rng.choice('abc')
        if path.count('/') < 4 and tree.get(path) is None:
            tree.put(path, linked if rng.random() < 0.1 else random_entry(rng, (1, 10 + number)))
    return tree


def copy_tree(tree):
    copy = fr.Tree()
    for path in ['', *tree.below('')]:
        copy.put(path, tree.get(path))
    return copy


def random_remote(rng, local):
    """A replica: of `local` before it was renamed, removed, added to, changed; or of something else."""
    tree = copy_tree(local) if rng.random() < 0.8 else random_local(rng)
    for _ in range(rng.randrange(6)):
        paths = list(tree.below(''))
        old = rng.choice(paths) if paths else ''
        above = rng.choice(sorted(filter(tree.is_directory, tree.inside)))
        new = (above + '/' if above else '') + rng.choice('abcd')
        what = rng.choice(['move', 'move', 'put', 'drop', 'change', 'unknown'])
        if what == 'move' and old and not (new + '/').startswith(old + '/') and not (
                old + '/').startswith(new + '/'):
            tree.put(new, None)
            tree.move(old, new)
        elif what == 'put' and new != old:
            tree.put(new, None)
            tree.put(
                new,
                random_entry(rng, rng.choice([None, (1, 10 + rng.randrange(9)), (2, rng.randrange(10**6))])))
        elif what == 'drop' and old:
            tree.put(old, None)
        elif what == 'change' and old:
            tree.put(old, tree.get(old)._replace(mtime_ns=rng.choice([None, *TIMES])))
        elif what == 'unknown' and old:
            for path in [old, *tree.below(old)]:
                tree.put(path, fr.UNKNOWN)
    inodes = collections.Counter(tree.get(path).inode for path in tree.below('') if tree.is_directory(path))
    for path in list(tree.below('')):           # a directory has one name only
        if tree.is_directory(path) and inodes[tree.get(path).inode] > 1:
            tree.put(path, tree.get(path)._replace(inode=None))
    return tree


def all_paths(*trees):
    return dict.fromkeys([path for tree in trees for path in ['', *tree.below('')]], fr.LOOK)


def listing_of(tree):
    return {path: tree.get(path)._replace(inode=None, ctime_ns=0) for path in ['', *tree.below('')]}


def assert_same_trees(there, here):
    assert set(listing_of(there)) == set(listing_of(here))
    for path, entry in listing_of(here).items():
        other = there.get(path)
        assert other._replace(inode=None, ctime_ns=0, mtime_ns=0) == entry._replace(mtime_ns=0), path
        assert fr.same_time(other.mtime_ns, entry.mtime_ns), (path, other, entry)


def assert_can_be_taken(tree, step):
    """What a POSIX system, and a user other than root, would ask of this step where `tree` stands."""
    there, above = tree.get(step.path), tree.get(fr.parent(step.path))
    changes = {} if step.verb == 'meta' else {step.path, step.detail} if step.verb == 'move' else {step.path}
    for directory in map(fr.parent, changes):
        if step.verb == 'remove' and tree.get(directory).kind == '?':
            continue                    # gone already is as good
        assert tree.is_directory(directory) and tree.get(directory).mode & 0o700 == 0o700, (
            step, tree.get(directory))
    if step.verb == 'move':
        assert tree.get(step.detail) is not None and (there is None or there.kind in 'fl'), step
        assert not (step.path + '/').startswith(step.detail + '/'), step
    elif step.verb == 'meta':
        assert there is not None, step
    elif step.verb == 'remove':
        assert there is not None and not tree.inside.get(step.path), step
    elif step.verb == 'dir':
        assert there is None or there.kind == '?', step
    else:
        assert (there is None or there.kind != 'd') and above is not None, step


def check_plan(remote, local):
    """Each step of the plan can be taken, and together they make `remote` equal to `local`. Returns them."""
    before, steps = copy_tree(remote), fr.plan(remote, local, all_paths(remote, local))
    for step in steps:
        assert_can_be_taken(before, step)
        fr.apply(before, step)
    assert_same_trees(before, local)
    assert_same_trees(remote, local)        # what plan() left behind is what the steps do
    return steps


@pytest.mark.parametrize('part', range(4))
def test_applying_the_plan_gives_the_goal_for_thousands_of_random_pairs(part):
    for seed in range(part * 1500, (part + 1) * 1500):
        rng = random.Random(seed)
        local = random_local(rng)
        remote = random_remote(rng, local)
        try:
            check_plan(remote, local)
            assert not fr.plan(remote, local, all_paths(local)), 'an equal pair has steps'
        except AssertionError as error:
            raise AssertionError('seed %d: %s\n%s\n%s' % (
                seed, error, listing_of(random_remote(random.Random(seed), local)), listing_of(local)))


def known_only(tree):
    for path in list(tree.below('')):
        if (tree.get(path) or fr.Entry('f')).kind == '?':
            tree.put(path, None)
    return tree


def take_there(truth, step):
    """Takes a step as the receiver would, whatever stands there; the code it answers."""
    there = truth.get(step.path)
    empty = there is None or there.kind != 'd' or not truth.inside[step.path]
    if not truth.is_directory(fr.parent(step.path)) and step.verb != 'remove':
        return 2
    if step.verb == 'meta':
        if there is None:
            return 2
        truth.put(step.path, there._replace(mode=step.entry.mode))
    elif step.verb == 'remove':
        if not empty:
            return 1
        truth.put(step.path, None)
    elif step.verb == 'dir':
        if there is None or there.kind != 'd':
            truth.put(step.path, step.entry)
    elif step.verb == 'move' and truth.get(step.detail) is None:
        return 2
    elif not empty or step.verb == 'move' and (step.path + '/').startswith(step.detail + '/'):
        return 1
    elif step.verb == 'move':
        truth.put(step.path, None)
        truth.move(step.detail, step.path)
    else:
        truth.put(step.path, step.entry)
    return 0


def test_after_failures_among_thousands_of_random_steps_it_knows_what_stands_there():
    for seed in range(3000):
        rng = random.Random(seed)
        local = random_local(rng)
        truth = known_only(random_remote(rng, local))
        remote, answers = copy_tree(truth), []
        for _ in range(rng.randrange(1, 4)):        # plans, each in the belief that all before was taken
            for step in fr.plan(remote, local, all_paths(remote, local)):
                failed, done = rng.random() < 0.1, rng.random() < 0.3       # it may be done all the same
                code = take_there(truth, step) if done or not failed else 1
                answers.append(([step], 1 if failed else code))
            local = known_only(random_remote(rng, local))
        fr.recover(remote, answers)
        for path in all_paths(truth, remote):
            there, believed = truth.get(path), remote.get(path)
            assert believed is not None or there is None, (seed, path, there)
            assert believed is None or believed.kind == '?' or believed.mtime_ns is None or there is not None and (
                believed.kind, believed.size, believed.target) == (there.kind, there.size, there.target), (
                    seed, path, there, believed)


def test_without_delete_nothing_is_removed_or_moved_away():
    for seed in range(1000):
        rng = random.Random(seed)
        local = random_local(rng)
        remote = random_remote(rng, local)
        only_there = [path for path in remote.below('') if local.get(path) is None
                      and local.get(path.split('/')[0]) is None]
        steps = fr.plan(remote, local, all_paths(remote, local), delete=False)
        assert not [step for step in steps if step.verb == 'move'], seed
        assert not [step for step in steps if step.verb == 'remove' and local.get(step.path) is None], seed
        assert all(remote.get(path) is not None for path in only_there), seed


def small_tree(**changes):
    tree = fr.Tree()
    entries = {'': ('d', 0o755, 0), 'd': ('d', 0o755, 0), 'd/f': ('f', 0o644, 5), 'd/s': ('d', 0o755, 0),
               'd/s/g': ('f', 0o600, 7), 'l': ('l', 0o777, 0)}
    for inode, (path, (kind, mode, size)) in enumerate(entries.items()):
        entry = fr.Entry(kind, mode, size, 10**18 + 5, 'to' if kind == 'l' else '', (1, inode))
        tree.put(path, entry._replace(**changes.get(path.replace('/', '_'), {})))
    return tree


@pytest.mark.parametrize('old, new', [('d', 'e'), ('d/s', 's'), ('d/f', 'd/s/h'), ('l', 'd/l'),
                                      ('d/s/g', 'g')])
@pytest.mark.parametrize('everything', [True, False])
def test_a_rename_is_planned_as_a_rename(old, new, everything):
    local, remote = small_tree(), small_tree()
    local.move(old, new)
    touched = [old, new, *small_tree().below(old), *local.below(new), fr.parent(old), fr.parent(new)]
    hints = all_paths(local, remote) if everything else dict.fromkeys(touched, fr.LOOK)
    before = copy_tree(remote)
    steps = fr.plan(remote, local, hints)
    assert [(s.verb, s.detail, s.path) for s in steps if s.verb != 'meta'] == [('move', old, new)], steps
    for step in steps:
        fr.apply(before, step)
    assert_same_trees(before, local)


def test_what_is_made_where_something_was_renamed_away_is_sent_once():
    """Twice, and taken back twice because it could not be read, it would be taken to stand there."""
    local, remote = small_tree(), small_tree()
    local.move('d', 'e')
    local.put('d', fr.Entry('d', 0o755, 0, 1, '', (1, 90), 1))
    local.put('d/f', fr.Entry('f', 0o644, 3, 1, '', (1, 91), 1))
    hints = dict.fromkeys(['d', 'e', 'd/f', *small_tree().below('d')], fr.CONTENT)
    steps = fr.plan(remote, local, hints)
    assert [step.path for step in steps if step.verb == 'file'].count('d/f') == 1, steps


@pytest.mark.parametrize('again, inode', [('d', 60), ('f', 61)])
@pytest.mark.parametrize('moved', ['d/s', 'd/f'])
def test_where_something_was_renamed_away_from_inside_what_was_renamed_another_can_stand(moved, again, inode):
    """And an inode number that was given to something new is no rename."""
    local, remote = small_tree(), small_tree()
    reused = local.get(moved).inode
    local.move('d', 'e')
    at = 'e' + moved[1:]
    local.move(at, 's')
    local.put(at, fr.Entry(again, 0o755, 0, 10**18, '', (1, inode)))
    check_plan(remote, local)
    local.put('s', None)
    local.put('z', fr.Entry('f' if moved == 'd/s' else 'd', 0o755, 0, 10**18, '', reused))
    assert 'z' not in [step.path for step in check_plan(small_tree(), local) if step.verb == 'move']


@pytest.mark.parametrize('change, hint, expected', [
    ({}, 'LOOK', []),
    ({}, 'META', []),
    ({}, 'CONTENT', [('file', '5')]),
    ({'mode': 0o600}, 'META', [('meta', 'm')]),
    ({'mode': 0o600}, 'LOOK', [('meta', 'm')]),
    ({'mode': 0o600, 'mtime_ns': 1}, 'META', [('meta', 'mt')]),
    ({'mtime_ns': 1}, 'META', [('meta', 't')]),
    ({'mtime_ns': 1}, 'LOOK', [('file', '5')]),
    ({'mtime_ns': None}, 'META', [('file', '5')]),
    ({'mtime_ns': 10**18}, 'LOOK', [('file', '5')]),
    ({'size': 4}, 'META', [('file', '4')]),
    ({'size': 4}, 'LOOK', [('file', '4')]),
    ({'kind': 'l', 'target': 'x', 'size': 0}, 'META', [('file', '')]),
    ({'kind': '?'}, 'META', [('file', '?')]),
])
def test_a_hint_says_what_may_have_changed(change, hint, expected):
    steps = fr.plan(small_tree(d_f=change), small_tree(), {'d/f': getattr(fr, hint)})
    assert [(step.verb, step.detail if step.verb == 'meta' else
             {'?': '?', 'f': str(step.before.size)}.get(step.before.kind, ''))
            for step in steps if step.path == 'd/f'] == expected


def test_a_directory_that_was_renamed_and_closed_is_closed_before_something_comes_into_it():
    local, remote = small_tree(), small_tree()
    local.move('d', 'e')
    local.put('e', local.get('e')._replace(mode=0o700))
    local.put('e/new', fr.Entry('f', 0o644, 5, 10**18, '', (1, 60)))
    steps = [(step.verb, step.path) for step in check_plan(remote, local)]
    assert steps.index(('meta', 'd')) < steps.index(('move', 'e')) < steps.index(('file', 'e/new'))


@pytest.mark.parametrize('directories, files', [(10000, 0), (1000, 20)])
def test_ten_thousand_renames_are_planned_in_seconds(directories, files):
    remote, local, hints, numbers = fr.Tree(), fr.Tree(), {}, itertools.count(1)
    for tree in (remote, local):
        tree.put('', fr.Entry('d', 0o755, 0, 1, '', (1, 0)))

    def add(path, kind):
        inode = next(numbers)
        entry = fr.Entry(kind, 0o755, kind == 'f', 10**18, '', (1, inode), inode)
        remote.put('a' + path, entry)
        local.put('b' + path if path else 'a', entry)
        hints['a' + path] = hints['b' + path] = fr.LOOK
    add('', 'd')
    local.put('b', fr.Entry('d', 0o755, 0, 10**18, '', (1, -1), 1))
    for number in range(directories):
        add('/%d' % number, 'd' if files else 'f')
        for name in range(files):
            add('/%d/%d' % (number, name), 'f')
    since = time.process_time()
    steps = fr.plan(remote, local, hints)
    assert time.process_time() - since < 5
    assert sum(step.verb == 'move' for step in steps) == directories


def test_what_was_planned_from_stays_in_memory_no_longer_than_it_is_used():
    """Each connection that is lost leaves a tree of the replica, and nothing looks for circles in time."""
    def tree(*entries):
        made = fr.Tree()
        for path, entry in (('', fr.Entry('d', 0o755, 0, 1)), *entries):
            made.put(path, entry)
        return made

    remote = tree(('closed', fr.Entry('d', 0o500, 0, 1)), ('closed/old', fr.Entry('f', 0o644, 1, 1)))
    local = tree(('closed', fr.Entry('d', 0o500, 0, 1)), ('closed/new', fr.Entry('f', 0o644, 1, 1)))
    watched = weakref.ref(remote)
    gc.disable()
    try:
        assert len(fr.plan(remote, local, all_paths(remote, local))) == 4
        del remote
        assert watched() is None
    finally:
        gc.enable()


def test_removals_go_from_the_deepest_up():
    local, remote = small_tree(), small_tree()
    local.put('d', None)
    steps = [s for s in fr.plan(remote, local, all_paths(small_tree())) if s.verb != 'meta']
    assert [(s.verb, s.path) for s in steps] == [('remove', 'd/s/g'), ('remove', 'd/s'), ('remove', 'd/f'),
                                                 ('remove', 'd')]


def test_what_is_listed_is_believed_where_it_is_ours():
    local, known = small_tree(), small_tree(d_f={'size': 9})
    known.put('was', fr.Entry('f', 0o644, 3, 10**18 + 7, '', (1, 50)))
    known.put('changed', fr.Entry('f', 0o644, 3, 10**18 + 7, '', (1, 51)))
    listed = [('', local.get('')._replace(inode=None)), ('d', fr.Entry('d', 0o700, 0, 5)),
              ('d/f', local.get('d/f')._replace(inode=None, mtime_ns=10**18)),      # whole seconds: the same
              ('l', fr.Entry('l', 0o777, 0, 10**18 + 5, 'elsewhere')),
              ('theirs', fr.Entry('d', 0o755, 0, 1)), ('theirs/f', fr.Entry('f', 0o644, 1, 1)),
              ('mine', fr.Entry('f', 0o644, 1, 1)),
              ('was', fr.Entry('f', 0o644, 3, 10**18)), ('changed', fr.Entry('f', 0o644, 4, 10**18 + 7))]
    remote = fr.believe(listed, local, known, lambda path, entry: path == 'mine')
    assert {path: remote.get(path) for path in ['', *remote.below('')]} == {
        '': local.get(''), 'd': listed[1][1], 'd/f': local.get('d/f'), 'l': listed[3][1], 'mine': listed[6][1],
        'was': known.get('was'), 'changed': listed[8][1]}
    assert set(fr.believe(listed, local, fr.Tree(), lambda path, entry: False).below('')) == {'d', 'd/f', 'l'}


# ==== Records ===============================================================================================

def test_a_record_is_header_paths_and_length():
    assert fr.wire('') == b'.'
    assert fr.wire('a b/c') == b'./a b/c'
    assert fr.wire('new\n\nline') == b'./new/\n/\nline'
    assert fr.wire(os.fsdecode(b'\xff')) == b'./\xff'
    assert fr.record('meta', 7, ('-', '12'), [b'.', b'./a'], 0, 'm') == b'meta 7 2 - 12\n.\n./a\n0 m\n'
    assert fr.record('beat', 8, (), [], 0, 'm').split() == [b'beat', b'8', b'0', b'0', b'm']


@pytest.mark.parametrize('ns, fine, whole',
                         [(0, '0', '0'), (10**18, '1000000000', '1000000000'),
                          (10**18 + 5, '1000000000.000000005', '1000000000'), (-10**9, '-1', '-1'),
                          (1, '0.000000001', '0'),
                          (4102444800 * 10**9 + 120, '4102444800.000000120', '4102444800')])
def test_a_time_is_written_as_touch_takes_it(ns, fine, whole, tmp_path):
    assert (fr.seconds_of(ns, True), fr.seconds_of(ns, False)) == (fine, whole)
    subprocess.run(['touch', '-d', '@' + fine, str(tmp_path)], check=True)
    assert os.stat(str(tmp_path)).st_mtime_ns == ns


@pytest.mark.parametrize('mode', [0o644, 0o600, 0o755, 0o4755, 0o1777, 0o000])
def test_under_the_umask_a_new_file_can_never_do_more_than_it_shall(mode, tmp_path):
    run_sh('dash', 'umask %s; : >f; mkdir d' % fr.umask_for(mode), cwd=tmp_path)
    for name in ('f', 'd'):
        assert stat.S_IMODE(os.stat(str(tmp_path / name)).st_mode) & ~mode == 0


def members(names=SH_NAMES, content=bytes(range(256)), extra=True):
    """Directories, files and links under hostile names, each once as the name and once as a target."""
    out = [(b'b', fr.Entry('d', 0o700), b'')]
    for number, name in enumerate(names):
        when = [10**18, 1234567890123456789, 5 * 10**9 + 1][number % 3]
        at = b'b/d%d' % number
        data = [content * 3, b'', b'-n', content + b'\n', b"a\\n%s'\r\n"][number % 5]
        inside = at + b'/' + name
        out += [(at, fr.Entry('d', [0o755, 0o700, 0o2775][number % 3]), b''),
                (inside, fr.Entry('f', [0o644, 0o600, 0o4755, 0o444][number % 4], len(data), when), data),
                (at + b'/-l', fr.Entry('l', 0o777, 0, when, os.fsdecode(name)), b'')]
    if extra:
        deep = b'b/' + b'/'.join([b'x' * 90] * 3)
        out += [(deep[:n], fr.Entry('d', 0o755), b'') for n in (92, 183, 274)]
        out += [(deep + b'/f', fr.Entry('f', 0o644, 600, 10**18), b'y' * 600),
                (deep + b'/l', fr.Entry('l', 0o777, 0, 10**18, 'z' * 1000), b'')]
    return out


def assert_unpacked(root, expected, whole_seconds, link_times=True):
    tree = tree_of(os.fsencode(str(root)), whole_seconds)
    for name, entry, data in expected:
        kind, mode, mtime, what = tree[name]
        assert (kind, what) == ({'f': stat.S_IFREG, 'd': stat.S_IFDIR, 'l': stat.S_IFLNK}[entry.kind],
                                data if entry.kind == 'f' else os.fsencode(entry.target)), name
        assert mode == entry.mode or entry.kind == 'l', name
        if entry.mtime_ns is not None and (link_times or entry.kind != 'l'):
            assert mtime == entry.mtime_ns // (10**9 if whole_seconds else 1), name


@pytest.mark.parametrize('tar', ['tar', 'busybox tar'])
def test_an_archive_is_read_by_tar(tar, tmp_path):
    done = subprocess.run([need(tar.split()[0]), *tar.split()[1:], 'xpof', '-'],
                          input=fr.archive(members()),
                          cwd=str(tmp_path),
                          stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, b'')
    assert_unpacked(tmp_path, members(), tar != 'tar', tar == 'tar')      # busybox's sets no times of links


@pytest.mark.parametrize('shell', SHELLS)
def test_a_script_writes_the_same_files_in_every_shell(shell, tmp_path):
    content = bytes(range(128 if shell == 'yash' else 256))
    what = members(names_for(shell), content)
    for fine in [False] + [True] * (shell != 'busybox sh'):         # whose touch knows whole seconds only
        root = tmp_path / str(fine)
        root.mkdir()
        (root / 's').write_bytes(fr.script(what, fine, False))
        assert run_sh(shell, 'umask 022; touch=touch failed=0; . ./s; echo $failed', cwd=root) == b'0\n'
        assert_unpacked(root, what, not fine)


# ==== The receiver's functions, one by one ==================================================================

@pytest.mark.parametrize('shell', SHELLS)
def test_a_path_is_read_as_it_was_written(shell, tmp_path):
    names = names_for(shell) + [b'a/' + name for name in names_for(shell)]
    lines = b''.join(fr.wire(os.fsdecode(name)) + b'\n' for name in names)
    text = fr.RECEIVER + "newline='\n'\nn=0; while [ $n -lt COUNT ]; do get; printf '%s\\0' \"$p\"; "
    text += 'n=$((n + 1)); done'
    assert run_sh(shell,
                  text.replace('COUNT', str(len(names))), lines,
                  tmp_path).split(b'\0')[:-1] == [b'./' + name for name in names]


@pytest.mark.parametrize('shell', SHELLS)
def test_a_path_below_a_link_is_refused(shell, tmp_path):
    (tmp_path / 'd' / 'e').mkdir(parents=True)
    (tmp_path / 'f').write_bytes(b'')
    (tmp_path / 'link').symlink_to('d')
    (tmp_path / 'd' / 'up').symlink_to('..')
    (tmp_path / 'dangling').symlink_to('none')
    good = ['./x', './d', './d/x', './d/e/x', './link', './d/up', './d/e/x']
    bad = [
        './link/x', './f/x', './none/x', './d/up/x', './d/up/d/x', './dangling/x', './d/e/none/x',
        './link/e/x'
    ]
    text = "checked=''; for p in %s; do if solid $p >/dev/null; then echo $p; fi; done" % ' '.join(good + bad)
    assert run_sh(shell, fr.RECEIVER + text, cwd=tmp_path).decode().split() == good


@pytest.mark.parametrize('taker', [0, 1, 3, 5])
@pytest.mark.parametrize('shell', SHELLS)
def test_no_byte_too_many_is_taken_from_a_stream_that_dribbles(shell, taker, tmp_path):
    """Taker 0 is the one that probe finds for itself."""
    if taker and shell != 'dash':
        pytest.skip('each taker once is enough')
    text = fr.RECEIVER + (
        "newline='\n'\nnonce=n stage=./st staged=''; do_probe >/dev/null; %s echo go; take 70001 | wc -c; "
        "IFS= read -r line; echo \"$line\"" % ('taker=%d;' % taker if taker else ''))
    process = subprocess.Popen(['sh', '-c', text],
                               executable=need(shell.split()[0]),
                               cwd=str(tmp_path),
                               bufsize=0,
                               stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == b'go\n'
    data = bytes(70001) + b'next line\n'
    for at in range(0, len(data), 997):
        process.stdin.write(data[at:at + 997])
        time.sleep(0.0003)              # the writer dribbles; nothing is waited for
    out, err = process.communicate(timeout=20)
    assert (out.split(), err) == ([b'70001', b'next', b'line'], b'')


@pytest.mark.parametrize('stream, code', [(b'm\nnext\n', 0), (b'left over\nmorem\nnext\n', 1),
                                          (b'left over\nm\nnext\n', 1), (b'\0\xff/m\nnext\n', 1)])
@pytest.mark.parametrize('shell', SHELLS)
def test_what_is_left_of_a_record_is_passed_over(shell, stream, code, tmp_path):
    if shell == 'yash':
        stream = stream.replace(b'\0\xff', b'x')
    text = fr.RECEIVER + 'marker=m; settle; echo $?; IFS= read -r line; echo "$line"'
    assert run_sh(shell, text, stream, tmp_path) == b'%d\nnext\n' % code


NONCE = '0123456789ab'


def session_text(replica, flags='-', more=''):
    """What a shell runs for a session without options; with `more` functions than the receiver's."""
    return '%s\n%s\nmain - %s %s %s "" -' % (fr.RECEIVER, more, NONCE, shlex.quote(str(replica)), flags)


def session(shell, replica, stream, more=''):
    """What the receiver says to these records, line by line."""
    said = run_sh(shell, session_text(replica, more=more), stream, replica.parent).decode()
    return said.partition(NONCE + ' listed\n')[2].splitlines()


@pytest.mark.parametrize('shell', SHELLS)
def test_bytes_cannot_end_their_own_record_though_their_writer_knows_the_nonce(shell, tmp_path):
    replica = tmp_path / 'far'
    write(str(replica / 'theirs'))
    data = ('x\n%s.\n%s\nbeat 98 0 \n0\n' % (NONCE, NONCE)).encode()
    stream = (fr.record('file', 1, ('022', '-', '1', '-'), [b'./f'], len(data), 'random') + data + b'random\n'
              + fr.record('beat', 2, (), [], 0, 'another'))
    full = 'take() { dd bs=1 count=1 2>/dev/null; return 1; }'          # as where the disk is full
    assert session(shell, replica, stream, full) == [NONCE + ' 1 1', NONCE + ' 2 0']


@pytest.mark.parametrize('shell', SHELLS)
def test_nothing_is_made_through_what_somebody_made_at_our_names(shell, tmp_path):
    replica, outside = tmp_path / 'far', tmp_path / 'outside'
    outside.mkdir()
    staging, temporary = ('.file_replicator.' + NONCE + end for end in ('', '-new'))
    write(str(replica / staging / 's'), 'echo >%s/run\n' % outside)
    os.symlink(str(outside), str(replica / staging / 'b'))
    os.symlink(str(outside), str(replica / temporary))
    members = [(b'b', fr.Entry('d', 0o700), b''), (b'b/1', fr.Entry('d', 0o700), b''),
               (b'b/1/f', fr.Entry('f', 0o644, 1, 10**18), b'x')]
    script = fr.script(members, False, False)
    stream = (fr.record('probe', 1, (), [], 0, 'm') + fr.record('link', 2, ('1',), [b'none.', b'./link'], 0, 'm')
              + fr.record('bulk', 3, ('script',), [b'.'], len(script), 'm') + script + b'm\n')
    said = session(shell, replica, stream)
    assert [line[-2:] for line in said if ' + ' not in line] == [' 0'] * 3, said
    assert os.readlink(str(replica / 'link')) == 'none' and (replica / 'f').read_bytes() == b'x'
    assert sorted(os.listdir(str(replica))) == ['f', 'link'] and not os.listdir(str(outside))


@pytest.mark.parametrize('tool, text', [
    # as toybox's, which knows -printf, but not all its letters
    ('find', 'case $* in *%%y*) exit 1 ;; esac; exec %s "$@"'),
    # as that of uutils, which reads too much if its output is a file
    ('head', 'if [ -f /dev/stdout ]; then cat >/dev/null; fi; exec %s "$@"'),
])
def test_a_tool_that_knows_only_half_of_it_is_used_for_that_half_or_not_at_all(tool, text, tmp_path):
    source = tmp_path / 'src'
    write(str(source / 'd/f'), 'x' * 1000, mtime_ns=10**18)
    words = shell_command(tmp_path, 'dash')
    shims = tmp_path / 'shims-dash'
    write(str(shims / tool), '#!/bin/sh\n' + text % need(tool), 0o755)
    if tool == 'head':
        write(str(shims / 'dd'), '#!/bin/sh\ncase $* in *fullblock*) exit 1 ;; esac; exec %s "$@"' % need('dd'), 0o755)
    once('--no-replicate-on-change', source, tmp_path / 'far', *words)
    assert not difference(str(source), str(tmp_path / 'far/src'))
    assert once('--no-replicate-on-change', source, tmp_path / 'far', *words).stdout == 'in step\n'


# ==== Far sides =============================================================================================

class FarSide:
    """A connection command, how the replica's parent is called over there, and where that is seen from here.
    `whole` is true where times are kept to the second, `ascii` where only such names can be."""

    def __init__(self, words, parent, seen=None, whole=False, ascii=False):
        self.words, self.parent, self.seen = list(words), str(parent), str(seen or parent)
        self.whole, self.ascii = whole, ascii


def need_root():
    if os.getuid():
        refuse = pytest.fail if os.environ.get('REQUIRE_ALL') == '1' else pytest.skip
        refuse('only root can make this far side')


def without_tar(tmp, words):
    """The same connection command where tar does not work."""
    if words[0] == 'busybox':
        words = [busybox_without_tar(os.path.join(str(tmp), 'busybox')), *words[1:]]
    write(os.path.join(str(tmp), 'no-tar', 'tar'), '#!/bin/sh\nexit 1\n', 0o755)
    path = next((word for word in words if word.startswith('PATH=')), 'PATH=' + os.environ['PATH'])
    return ['env', 'PATH=%s/no-tar:%s' % (tmp, path[5:]), *words[2 * (words[0] == 'env'):]]


def dash_root(directory):
    """A root with dash as its shell and busybox's applets as its tools; none is called busybox or tar."""
    busybox_root(directory, without=('tar', 'sh', 'ash', 'hush'))
    os.rename(os.path.join(directory, 'bin', 'busybox'), os.path.join(directory, 'tools'))
    for name in os.listdir(os.path.join(directory, 'bin')):
        os.unlink(os.path.join(directory, 'bin', name))
        os.symlink('../tools', os.path.join(directory, 'bin', name))
    dash = need('dash')
    libraries = subprocess.run(['ldd', dash], stdout=subprocess.PIPE, check=True).stdout.decode()
    for library in re.findall(r'(/\S+) \(', libraries):
        os.makedirs(directory + os.path.dirname(library), exist_ok=True)
        shutil.copy(library, directory + library)
    shutil.copy(dash, os.path.join(directory, 'bin', 'dash'))
    os.symlink('dash', os.path.join(directory, 'bin', 'sh'))
    return directory


@pytest.fixture(scope='session')
def sshd(tmp_path_factory):
    """A real sshd on a free port of this machine, with its own keys: the ssh command that reaches it."""
    daemon, keygen, ssh = need('sshd'), need('ssh-keygen'), need('ssh')
    need_root()
    directory = str(tmp_path_factory.mktemp('sshd'))
    os.makedirs('/run/sshd', exist_ok=True)
    for name in ('host', 'user'):
        subprocess.run([keygen, '-q', '-t', 'ed25519', '-N', '', '-f',
                        os.path.join(directory, name)],
                       check=True)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    write(os.path.join(directory, 'config'), (
        'ListenAddress 127.0.0.1\nPort {1}\nHostKey {0}/host\nAuthorizedKeysFile {0}/user.pub\n'
        'PidFile none\nUsePAM no\n'
        'StrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nMaxStartups 100\n').format(
            directory, port))
    log = os.path.join(directory, 'log')
    start = [daemon, '-D', '-f', os.path.join(directory, 'config'), '-E', log]
    try:
        pwd.getpwnam('sshd')
    except KeyError:        # sshd wants that user: it gets a list of its own, the machine keeps its
        write(os.path.join(directory, 'passwd'),
              'root:x:0:0:root:/root:/bin/bash\nsshd:x:99:99::/run/sshd:/bin/false\n')
        start = [
            'unshare', '-m', 'sh', '-c', 'mount --bind "$0" /etc/passwd && exec "$@"', directory + '/passwd',
            *start
        ]
    process = subprocess.Popen(start, stdin=subprocess.DEVNULL)
    words = [
        ssh, '-F', '/dev/null', '-p',
        str(port), '-i',
        os.path.join(directory, 'user'), '-o', 'BatchMode=yes', '-o', 'StrictHostKeyChecking=no', '-o',
        'UserKnownHostsFile=/dev/null', '-o', 'LogLevel=ERROR', 'root@127.0.0.1'
    ]
    try:
        until(
            lambda: subprocess.run([*words, 'true'], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL).
            returncode == 0, 20, lambda: open(log).read() if os.path.exists(log) else '')
        yield words
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope='session')
def docker():
    """The docker command: of the engine that answers, else of one of our own that needs nothing else.
    There is an image `file_replicator_test` of busybox."""
    client = need('docker')
    if subprocess.run([client, 'info'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        words, process, directory = [client], None, tempfile.mkdtemp(prefix='fr-docker.')
    else:
        daemon = need('dockerd')
        need_root()
        directory = tempfile.mkdtemp(prefix='fr-docker.')
        words = [client, '-H', 'unix://%s/socket' % directory]
        with open(os.path.join(directory, 'log'), 'wb') as log:
            process = subprocess.Popen([
                daemon, '--data-root', directory + '/data', '--exec-root', directory + '/exec', '--pidfile',
                directory + '/pid', '-H', words[2], '--storage-driver', 'vfs', '--bridge', 'none',
                '--iptables=false', '--ip6tables=false'
            ],
                                       stdin=subprocess.DEVNULL,
                                       stdout=log,
                                       stderr=log,
                                       start_new_session=True)
    try:
        until(
            lambda: (not process or process.poll() is None or pytest.fail('dockerd ended')) and subprocess.
            run([*words, 'info'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0, 60)
        root = busybox_root(directory + '/root')
        tar = subprocess.run(['tar', '-C', root, '-c', '.'], stdout=subprocess.PIPE, check=True).stdout
        subprocess.run([*words, 'import', '-', 'file_replicator_test'],
                       input=tar,
                       stdout=subprocess.DEVNULL,
                       check=True)
        yield words
        left = subprocess.run([*words, 'ps', '-aq', '--filter', 'ancestor=file_replicator_test'],
                              stdout=subprocess.PIPE)
        for name in left.stdout.decode().split():
            subprocess.run([*words, 'rm', '-f', name], stdout=subprocess.DEVNULL)
    finally:
        if process:
            process.terminate()
            process.wait(30)
        for place in ('data', 'exec'):
            subprocess.run(['umount', '-R', directory + '/' + place], stderr=subprocess.DEVNULL)
        shutil.rmtree(directory, ignore_errors=True)


def run_container(docker, name, volume):
    os.makedirs(volume, exist_ok=True)
    subprocess.run([
        *docker, 'run', '-d', '--network', 'none', '--name', name, '-v', volume + ':/volume',
        'file_replicator_test', 'sh', '-c', 'trap exit TERM; while :; do sleep 1; done'
    ],
                   stdout=subprocess.DEVNULL,
                   check=True)


@pytest.fixture
def container(docker, tmp_path):
    """The name of a running container, whose /volume is tmp_path/volume."""
    name = 'fr-%d-%d' % (os.getpid(), time.monotonic_ns())
    run_container(docker, name, str(tmp_path / 'volume'))
    yield name
    subprocess.run([*docker, 'rm', '-f', name], stdout=subprocess.DEVNULL)


FAR_SIDES = [
    *SHELLS, *(shell + ', no tar' for shell in ('bash', 'busybox sh', 'mksh', 'zsh')), 'chroot of busybox',
    'chroot of busybox, no tar', 'chroot of dash', 'ssh bash', 'ssh sh', 'docker'
]


def make_far_side(kind, request, tmp_path):
    there = tmp_path / 'there'
    there.mkdir()
    name, _, no_tar = kind.partition(', ')
    if name in SHELLS:
        words = shell_command(tmp_path, name)
        shim = os.path.join(str(tmp_path), 'shims-' + name.split()[0], 'dash')
        if os.path.lexists(shim):       # by the name of dash, zsh would not be a POSIX shell
            os.unlink(shim)
            write(shim, '#!/bin/sh\nexec %s "$@"\n' % os.path.join(os.path.dirname(shim), 'sh'), 0o755)
        return FarSide(without_tar(tmp_path, words) if no_tar else words, there, ascii=name == 'yash')
    if name.startswith('ssh'):
        return FarSide([*request.getfixturevalue('sshd'), name.split()[1]], there)
    if name == 'docker':
        docker, container = request.getfixturevalue('docker'), request.getfixturevalue('container')
        return FarSide([*docker, 'exec', '-i', container, 'sh'], '/volume', tmp_path / 'volume', whole=True)
    need_root()
    root = str(there)
    if name == 'chroot of dash':
        return FarSide([need('chroot'), dash_root(root), '/bin/sh'], '/srv', root + '/srv', whole=True)
    busybox_root(root, without=('tar',) if no_tar else ())
    return FarSide([need('chroot'), root, '/bin/busybox', 'sh'], '/srv', root + '/srv', whole=True)


@pytest.fixture(params=FAR_SIDES)
def far_side(request, tmp_path):
    return make_far_side(request.param, request, tmp_path)


def nasty_tree(root, ascii=False):
    """Small, with one of everything that has ever gone wrong."""
    top = os.fsencode(str(root))
    names = [
        name for name in SH_NAMES + [b'.hidden', b'..x', 'été'.encode(), b'a  b']
        if name.isascii() or not ascii
    ]
    for number, name in enumerate(names):
        write(os.path.join(top, name), b'content of %d' % number, mtime_ns=10**18 + number)
        write(os.path.join(top, b'directories', name, name), b'', mtime_ns=10**18 + number * 10**9)
        os.symlink(name, os.path.join(top, b'directories', name, b'link'))
    for name, mode in (('0600', 0o600), ('0755', 0o755), ('0444', 0o444), ('4755', 0o4755), ('0666', 0o666)):
        write(os.path.join(str(root), 'modes', name), name, mode)
        write(os.path.join(str(root), 'modes', 'd' + name, 'f'), name, 0o640)
        os.chmod(os.path.join(str(root), 'modes', 'd' + name), mode)
    write(os.path.join(str(root), 'modes', 'd0555', 'f'), 'in a directory that may not be written')
    for name, ns in (('1960', -315619200 * 10**9), ('fine', 1234567890123456789), ('1970', 1)):
        write(os.path.join(str(root), 'times', name), name, mtime_ns=ns)
    for name, data in (('nul', bytes(256 * 5)), ('bytes', bytes(range(256)) * 300),
                       ('crlf', b'a\r\nb\rc\n\r\n'), ('no newline', b'no newline'),
                       ('newlines', b'\n' * 1000), ('percent', b'%s %d \\n \\0 %%' * 99),
                       ('shell', b"'; rm -rf \"$PWD\" `touch x` $(touch y)\n"), ('empty', b''), ('-n',
                                                                                                 b'-n')):
        write(os.path.join(str(root), 'contents', name), data)
    write(os.path.join(str(root), 'large', 'l'),
          random.Random(1).getrandbits(8 * 3 * 10**6).to_bytes(3 * 10**6, 'big'))
    os.makedirs(os.path.join(str(root), 'empty', 'empty'))
    for name, target in (('dangling', 'no such'), ('to a directory', 'modes'), ('absolute', '/etc/passwd'),
                         ('newline', 'a\nb\n'), ('up', '../..'), ('long', 'x/' * 400), ('-dash', '-rf'),
                         ('itself', 'itself')):
        os.symlink(target, os.path.join(str(root), 'contents', name))
    os.chmod(os.path.join(str(root), 'modes', 'd0555'), 0o555)
    for directory in ('empty', 'directories', 'modes/d0555', '.'):
        os.utime(os.path.join(str(root), directory), ns=(0, 10**18 + 123456789))


def counting(words, count):
    """The connection command, with all that is sent to it copied to the file `count`."""
    return ['sh', '-c', 'tee -a "$0" | exec "$@"', str(count), *words]


def test_a_nasty_tree_arrives_and_a_restart_sends_nothing_and_edits_follow(far_side, tmp_path):
    source, replica = str(tmp_path / 'tree'), os.path.join(far_side.seen, 'tree')
    nasty_tree(source, far_side.ascii)
    done = once('--no-replicate-on-change', source, far_side.parent, *far_side.words)
    assert difference(source, replica, far_side.whole) == []
    assert done.stderr == '' and 'in step' in done.stdout

    count = tmp_path / 'count'
    done = once('--no-replicate-on-change', source, far_side.parent, *counting(far_side.words, count))
    assert done.stdout.split('\n') == ['in step', ''], done.stdout
    assert count.stat().st_size < 3 * len(fr.RECEIVER)
    assert difference(source, replica, far_side.whole) == []

    with Running(tmp_path, source, far_side.parent, *far_side.words) as run:
        for edit in ('echo more >>crlf; rm nul; mv bytes renamed; mkdir -p a/b/c; echo deep >a/b/c/f',
                     'chmod 600 crlf; ln -sf other up',
                     'mv ../modes moved; : >../large/l; touch -d @1000000000 shell; chmod 700 ../empty',
                     'rm -rf ../directories moved/d0755; mkdir nul; echo file >nul/f; printf %s "-n" >-n'):
            subprocess.run(['sh', '-c', edit], cwd=os.path.join(source, 'contents'), check=True)
            until_equal(source, replica, whole_seconds=far_side.whole, running=run)
        assert run.err() == ''
        assert run.stop() == 0
    assert difference(source, replica, far_side.whole) == []


def test_a_time_that_is_still_to_come_is_kept_and_not_sent_again(tmp_path):
    write(str(tmp_path / 's' / 'f'), 'x', mtime_ns=4102444800 * 10**9)
    for sent in (True, False):
        done = once('--no-replicate-on-change', tmp_path / 's', tmp_path / 'd', 'bash')
        assert ('sent f' in done.stdout) == sent
        assert difference(str(tmp_path / 's'), str(tmp_path / 'd' / 's')) == []


def within_a_tick():
    """A time in whole seconds, as of a coarse file system, that for two or three seconds proves nothing about a file."""
    return (int(time.time()) + 2) * 10**9


@pytest.mark.parametrize('how', ['at a start', 'by a poll'])
def test_a_file_that_changed_again_within_a_tick_and_kept_its_size_and_time_is_sent_again(how, tmp_path):
    source, far, when = str(tmp_path / 's'), str(tmp_path / 'd'), within_a_tick()
    write(source + '/f', 'one', mtime_ns=when)
    if how == 'at a start':
        for data in ('one', 'two'):
            write(source + '/f', data, mtime_ns=when)
            once('--no-replicate-on-change', source, far, 'bash')
            assert difference(source, far + '/s') == []
    else:
        with Running(tmp_path, '--poll', '0.2', source, far, 'bash') as run:
            write(source + '/f', 'two', mtime_ns=when)
            until_equal(source, far + '/s', 10, running=run)


def test_what_is_watched_is_not_sent_again_at_a_new_connection_because_it_changed_just_before(tmp_path):
    write(str(tmp_path / 's' / 'f'), 'one', mtime_ns=within_a_tick())
    with Running(tmp_path, tmp_path / 's', tmp_path / 'd', 'bash') as run:
        run.cut()
        run.says('connected again')
        run.in_step(2)
        assert run.out().count('sent f') == 1


@pytest.mark.parametrize(
    'kind', ['bash', 'bash, no tar', 'busybox sh', 'chroot of busybox', 'chroot of dash', 'docker'])
def test_a_link_among_many_files_keeps_its_time(kind, request, tmp_path):
    far_side = make_far_side(kind, request, tmp_path)
    for name in 'abc':
        write(str(tmp_path / 's' / name), name)
    os.symlink('a', str(tmp_path / 's' / 'l'))
    os.utime(str(tmp_path / 's' / 'l'), (10**9, 10**9), follow_symlinks=False)
    once('--no-replicate-on-change', tmp_path / 's', far_side.parent, *far_side.words)
    assert difference(str(tmp_path / 's'), os.path.join(far_side.seen, 's'), far_side.whole) == []


# ==== While it is watched ===================================================================================

class Watched:
    """The program watching a directory: `source` is replicated to `replica` by bash."""

    def __init__(self, tmp, *options, words=('bash',), env=None, prepare=None):
        self.source, self.replica = os.path.join(str(tmp), 'here',
                                                 'tree'), os.path.join(str(tmp), 'there', 'tree')
        os.makedirs(self.source)
        if prepare:
            prepare(self.source)
        self.run = Running(tmp, *options, self.source, os.path.dirname(self.replica), *words, env=env)

    def sh(self, text, at='', **environment):
        done = subprocess.run(['bash', '-c', 'set -e\n' + text],
                              cwd=os.path.join(self.source, at),
                              stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT,
                              env=dict(os.environ, **environment))
        assert done.returncode == 0, done.stdout.decode()

    def equal(self, within=15.0, at=''):
        until_equal(os.path.join(self.source, at), os.path.join(self.replica, at), within, running=self.run)

    def __enter__(self):
        self.run.__enter__()
        return self

    def __exit__(self, *error):
        self.run.__exit__(*error)


@pytest.fixture(scope='module')
def shared_watch(tmp_path_factory):
    """One program for the many small changes, each in a directory of its own."""
    with Watched(tmp_path_factory.mktemp('watched')) as watched:
        yield watched


CHANGES = '''
a new file                  | echo new >new
an empty file               | : >new
overwritten                 | echo other >f
overwritten, same size      | printf 'FIRST\\n' >f
bytes changed, time put back| touch -r f ../stamp; printf X | dd of=f conv=notrunc; touch -r ../stamp f
appended                    | echo more >>f
truncated                   | truncate -s 2 f
emptied                     | : >f
made longer by a hole       | truncate -s 100000 f
mode of a file              | chmod 600 f
mode with setuid            | chmod 4755 f
nobody may read it          | chmod 0 f
mode of a directory         | chmod 700 d
time of a file              | touch -d '2001-02-03 04:05:06.789' f
time of a directory         | touch -d '2001-02-03 04:05:06.789' d
time of a link              | touch -h -d '2001-02-03 04:05:06.789' l
a file is renamed           | mv f g
a link is renamed           | mv l m
renamed over another        | mv f d/f
renamed into a new directory| mkdir n; mv f n/f
two files change places     | mv f t; mv d/f f; mv t d/f
a directory is renamed      | mv d e
renamed, then changed       | mv d e; echo more >>e/f
renamed and a new one there | mv d e; mkdir d; echo new >d/f
two directories change places | mkdir x; echo x >x/x; mv d t; mv x d; mv t x
a directory goes up         | mv d/e .
a directory goes down       | mkdir n; mv d n/
in from elsewhere           | mkdir -p "$OUT/in/sub"; echo in >"$OUT/in/sub/f"; mv "$OUT/in" .
a file in from elsewhere    | echo in >"$OUT/file"; mv "$OUT/file" g
out of the tree             | mv d "$OUT/out-$$"
out, changed, and in again  | mv d "$OUT/o-$$"; echo out >"$OUT/o-$$/f"; mv "$OUT/o-$$" d
a file becomes a directory  | rm f; mkdir f; echo in >f/f
a directory becomes a file  | rm -r d; echo file >d
a file becomes a link       | ln -sf d/f f
a link becomes a file       | rm l; echo file >l
a directory becomes a link  | rm -r d; ln -s . d
a link becomes a directory  | rm l; mkdir l; echo in >l/f
links that cannot be followed| ln -s o o; ln -s f/x p; ln -s "$(printf %0300d 1)" r; sleep 0.3; echo 1 >t; mv -T t o; ln -sf m p; ln -sfn m r
a link leads elsewhere      | ln -sfn d l
a file is deleted           | rm f
a directory is deleted      | rm -r d
deleted and made anew       | rm -r d; mkdir d; echo new >d/f
a second name               | ln f h
a second name, written to   | ln f h; sleep 0.01; echo more >>h
a link with two names       | ln -P l m; sleep 0.01; touch -h -d @1000000000 l
one of two names is deleted | ln f h; rm f
directories and a file in it| mkdir -p a/b/c && echo in >a/b/c/f
a link that leads to a dash  | ln -s -- -l m; ln -s -- '-f l' n
links to strange places     | ln -s "$(printf 'a\\nb/\\nc')" m; ln -s d/ n
a copied tree               | cp -a d copy; cp -r /etc/init.d init
saved by a rename           | echo new >.f.tmp; mv .f.tmp f
saved by rename, with backup| ln f f~; echo new >.f.tmp; mv .f.tmp f
strange names               | : >"$(printf 'a\\nb')"; mkdir ./-rf; echo x >'-rf/$(x)'; mv f '*'; ln -s "'" q
sed -i                      | sed -i s/first/second/ f
patch                       | printf -- '--- f\\n+++ f\\n@@ -1 +1 @@\\n-first\\n+patched\\n' | patch -s f
vim                         | vim -es -u NONE -c 'normal ovim' -c 'set backup writebackup' -c wq f
vim with swap and undo      | vim -N -es -u NONE -c 'set undofile' -c 'normal ovim' -c wq f
emacs                       | emacs --batch -Q f --eval '(progn (insert "emacs") (save-buffer))' 2>/dev/null
tar                         | tar -C d -cf - . | (mkdir u; tar -C u -xpf -)
many files at once          | for i in $(seq 200); do echo $i >many$i; done
many made and deleted       | for i in $(seq 100); do echo $i >many$i; done; rm many*; echo last >many1
a file grows                | for i in $(seq 300); do echo $i >>grown; done
'''


@pytest.mark.parametrize('change', [pytest.param(line.split('|', 1)[1].strip(), id=line.split('|')[0].strip())
                                    for line in CHANGES.strip().split('\n')])
def test_while_watched_a_change_arrives(change, shared_watch, tmp_path, request):
    for tool in ('patch', 'vim', 'emacs'):
        if change.startswith(tool) or '| %s' % tool in change:
            need(tool)
    at = re.sub(r'\W+', '-', request.node.callspec.id)
    shared_watch.sh(
        'mkdir -p "$AT/d/e"; cd "$AT"; echo first >f; echo in d >d/f; echo in e >d/e/f; ln -s f l', AT=at)
    shared_watch.equal(8, at)
    shared_watch.sh(change, at, OUT=str(tmp_path))
    shared_watch.equal(8, at)
    shared_watch.sh('rm -rf "$AT" stamp', AT=at)


def test_a_log_that_is_kept_open_arrives_within_about_a_second(shared_watch):
    os.mkdir(os.path.join(shared_watch.source, 'log'))
    with open(os.path.join(shared_watch.source, 'log', 'f'), 'ab', 0) as log:
        for line in (b'first\n', b'second\n', b'third\n'):
            log.write(line)
            shared_watch.equal(3, 'log')


def test_a_file_that_is_always_being_written_to_arrives_all_the_same(shared_watch):
    script = 'for i in $(seq 100000); do echo $i; sleep 0.02; done | tee busy/new >busy/f'
    write(os.path.join(shared_watch.source, 'busy', 'f'))
    shared_watch.equal(at='busy')
    writer = subprocess.Popen(['bash', '-c', script], cwd=shared_watch.source, start_new_session=True)
    try:
        path = os.path.join(shared_watch.replica, 'busy', 'f')
        seen = until(lambda: os.path.exists(path) and os.path.getsize(path), 8)
        until(lambda: os.path.getsize(path) > seen, 5)
        until(lambda: os.path.exists(os.path.join(shared_watch.replica, 'busy', 'new')), 12)
    finally:
        os.killpg(writer.pid, signal.SIGKILL)
        writer.wait()
    shared_watch.equal(at='busy')


def test_a_file_that_is_being_written_is_not_sent_at_each_write_and_a_new_one_not_before_it_is_whole(shared_watch):
    write(os.path.join(shared_watch.source, 'slow', 'known'))
    shared_watch.equal(at='slow')
    shared_watch.sh('cd slow; for i in $(seq 15); do echo $i; sleep 0.1; [ $((i % 5)) != 3 ] || chmod 64$((i % 4)) new; done '
                    '| tee known >new')
    shared_watch.equal(at='slow')
    sent = re.findall(r'sent slow/(\w+) ', shared_watch.run.out())
    assert sent.count('new') == 1 and sent.count('known') <= 4, sent


def test_bytes_written_right_after_the_mode_was_changed_arrive_though_the_file_stays_open(shared_watch):
    path = os.path.join(shared_watch.source, 'open', 'db')
    write(path, 'A' * 4096, 0o644, 10**18)
    shared_watch.equal(at='open')
    fd = os.open(path, os.O_RDWR)
    try:
        os.fchmod(fd, 0o600)
        os.pwrite(fd, b'B' * 4096, 0)
        there = os.path.join(shared_watch.replica, 'open', 'db')
        until(lambda: open(there, 'rb').read() == b'B' * 4096, 5, shared_watch.run.log)
    finally:
        os.close(fd)


def test_directories_made_and_filled_at_once_are_not_missed(shared_watch):
    shared_watch.sh(
        'for i in $(seq 80); do mkdir -p race/$i/b/c && echo $i >race/$i/b/c/f && echo $i >race/$i/f; done')
    shared_watch.equal(at='race')
    shared_watch.sh(
        'for i in $(seq 80); do mv race/$i/b race/$i/e; rm race/$i/f; echo more >race/$i/e/new; done')
    shared_watch.equal(at='race')


def test_a_directory_is_watched_before_its_time_is_taken(shared_watch):
    """What is put in between the look at it and the watch on it changes its time, and no event tells."""
    for number in range(150):
        path = os.path.join(shared_watch.source, 'late', str(number))
        os.makedirs(path)
        end = time.monotonic() + 0.00002 * number
        while time.monotonic() < end:
            pass
        write(os.path.join(path, 'f'))
        if number % 10 == 9:
            shared_watch.equal(5, 'late')


def looked_at(top):
    """A Source that watches a directory, after its first look."""
    options = fr.parse(['--quiet', '--no-gitignore', top, '/nowhere', 'true'])
    source = fr.Source(top, fr.LeftOut(top, (), False), fr.Watch(True), fr.Report(options))
    source.hint('', fr.CONTENT)
    source.look()
    return source


def looked_at_with_replica(top):
    source = looked_at(top)
    return source, fr.Replica(source.report.options, source, source.report)


def test_names_that_are_gone_are_not_kept(tmp_path):
    write(str(tmp_path / 'src/base'))
    source = looked_at(str(tmp_path / 'src'))
    kept = []                           # open, so that no inode's number is given anew
    for number in range(5):
        path = str(tmp_path / ('src/%d' % number))
        os.link(str(tmp_path / 'src/base'), path)
        os.link(str(tmp_path / 'src/base'), path + '.twin')
        os.rename(path + '.twin', str(tmp_path / 'src/saved'))
        write(path + '.save', b'%d' % number)
        kept.append(open(path + '.save'))
        os.rename(path + '.save', str(tmp_path / 'src/saved'))
        write(path + '.new')
        source.listen()
        source.look()
        os.remove(path)
        os.remove(path + '.new')
        source.listen()
        source.look()
    assert sorted(source.names.values()) == [('base',), ('saved',)] and not source.fresh - {'base', 'saved'}
    for file in kept:
        file.close()


def look_again(source):
    source.listen()
    return source.look()


def test_bytes_are_never_taken_for_those_of_another_file_that_stood_there_when_we_looked(tmp_path):
    """Else they would go where that one went, and it has the same size and time."""
    top = str(tmp_path / 'source')
    write(top + '/f', 'one', mtime_ns=10**18)
    write(top + '/g', 'two', mtime_ns=10**18)
    source, replica = looked_at_with_replica(top)
    step = fr.Step('file', 'f', source.tree.get('f'))
    os.rename(top + '/f', top + '/e')
    os.rename(top + '/g', top + '/f')
    step, data = replica.read(step)
    assert data == b'two' and step.entry.inode[1] == os.stat(top + '/f').st_ino
    source.watch.give_up('the end')


def test_what_was_in_a_directory_that_is_now_a_link_to_itself_is_gone_and_no_problem(tmp_path):
    top = str(tmp_path / 'source')
    write(top + '/d/e/f')
    source = looked_at(top)
    shutil.rmtree(top + '/d')
    os.symlink('d', top + '/d')
    assert not source.see('d/e')
    source.scan('d')
    assert not source.report.problems and source.tree.get('d/e') is None
    source.watch.give_up('the end')


def test_what_was_written_through_another_name_that_went_before_we_looked_is_seen(tmp_path):
    top = str(tmp_path / 'source')
    write(top + '/f', 'first')
    source = looked_at(top)
    os.link(top + '/f', top + '/other')
    with open(top + '/other', 'ab') as file:
        file.write(b' and more')
    source.listen()
    os.remove(top + '/other')
    assert 'f' in look_again(source) and source.tree.get('f').size == len('first and more')


def test_another_name_of_a_file_and_a_change_through_it_are_seen_in_one_look(tmp_path):
    """An event tells only the name that was used: without the other one the older bytes would stay there."""
    top = str(tmp_path / 'source')
    write(top + '/f', 'first')
    source = looked_at(top)
    os.link(top + '/f', top + '/h')
    write(top + '/h', 'other')
    assert look_again(source)['f'] == fr.CONTENT
    write(top + '/h', 'third')
    os.unlink(top + '/h')
    assert look_again(source)['f'] == fr.CONTENT
    source.watch.give_up('the end')


@pytest.mark.parametrize('met_by', ['a look', 'reading'])
def test_what_was_done_through_a_name_just_before_another_file_took_it_is_seen(met_by, tmp_path):
    """The event of it comes when that name is known to be of another file."""
    top = str(tmp_path / 'source')
    write(top + '/f', 'both')
    os.link(top + '/f', top + '/h')
    source, replica = looked_at_with_replica(top)
    step = fr.Step('file', 'h', source.tree.get('h'))
    write(top + '/h', 'changed')
    write(top + '/new', 'another')
    os.rename(top + '/new', top + '/h')
    if met_by == 'a look':
        source.see('h', fr.LOOK)
    else:
        assert replica.read(step)[1] == b'another'
    assert 'f' in look_again(source) and source.tree.get('f').size == len('changed')
    source.watch.give_up('the end')


def test_where_events_were_lost_a_touch_does_not_hide_that_the_bytes_changed_before(tmp_path):
    top = str(tmp_path / 'source')
    write(top + '/f', 'one', mtime_ns=10**18)
    source = looked_at(top)
    write(top + '/f', 'two', mtime_ns=2 * 10**18)
    list(source.watch.read())           # as if they had been too many
    source.hint_everything()
    os.utime(top + '/f', ns=(3 * 10**18, 3 * 10**18))
    assert look_again(source)['f'] >= fr.LOOK
    source.watch.give_up('the end')


def test_bytes_that_changed_in_a_directory_that_is_renamed_twice_in_one_look_are_sent(tmp_path):
    """The event tells the path the directory had in between, where nothing was ever sent to."""
    top = str(tmp_path / 'source')
    write(top + '/e/f', 'one', mtime_ns=10**18)
    source = looked_at(top)
    os.rename(top + '/e', top + '/a')
    source.listen()
    source.look_at_hints()
    write(top + '/a/f', 'two', mtime_ns=10**18)
    os.rename(top + '/a', top + '/e')
    assert look_again(source)['e/f'] == fr.CONTENT
    source.watch.give_up('the end')


def test_bytes_that_changed_before_a_rename_to_where_nobody_watched_yet_are_sent(tmp_path):
    """Of the rename only one event comes, and the other name it tells was never sent."""
    top = str(tmp_path / 'source')
    write(top + '/a', 'one', mtime_ns=10**18)
    source = looked_at(top)
    os.rename(top + '/a', top + '/between')
    write(top + '/between', 'two', mtime_ns=10**18)
    os.makedirs(top + '/b/c')
    os.rename(top + '/between', top + '/b/c/e')
    assert look_again(source)['b/c/e'] == fr.CONTENT
    source.watch.give_up('the end')


def test_a_link_that_became_a_file_while_it_was_looked_at_is_looked_at_again(monkeypatch, capsys, tmp_path):
    source = looked_at(str(tmp_path))
    link, readlink = str(tmp_path / 'link'), os.readlink
    os.symlink('x', link)

    def replace_and_read(path):
        monkeypatch.undo()
        os.unlink(path)
        write(path, 'a file')
        return readlink(path)
    monkeypatch.setattr(os, 'readlink', replace_and_read)
    source.listen()
    assert source.look()['link'] and source.tree.get('link').kind == 'f' and not capsys.readouterr().err
    source.watch.give_up('the end')


def test_bytes_that_changed_before_a_rename_that_came_before_they_were_read_are_sent(tmp_path):
    top = str(tmp_path / 'source')
    write(top + '/f', 'one', mtime_ns=10**18)
    source, replica = looked_at_with_replica(top)
    write(top + '/f', 'two', mtime_ns=10**18)
    assert look_again(source)['f'] == fr.CONTENT
    os.rename(top + '/f', top + '/e')
    assert replica.read(fr.Step('file', 'f', source.tree.get('f'))) is None
    assert look_again(source)['e'] == fr.CONTENT
    source.watch.give_up('the end')


def test_a_directory_that_becomes_a_link_while_it_is_listed_takes_no_watch_from_another(monkeypatch, tmp_path):
    top = str(tmp_path / 'source')
    write(top + '/a/sub/f', 'old')
    source, scandir = looked_at(top), os.scandir

    def race(path):
        found = list(scandir(path))
        if path == top + '/new':
            monkeypatch.undo()
            [item.stat(follow_symlinks=False) for item in found]       # as if it came after that
            os.rename(path, str(tmp_path / 'away'))
            os.symlink('a', path)
        return contextlib.nullcontext(found)
    monkeypatch.setattr(os, 'scandir', race)
    os.makedirs(top + '/new/sub')
    look_again(source)
    look_again(source)
    assert source.tree.get('new').kind == 'l'
    write(top + '/a/sub/f', 'changed')
    assert look_again(source)['a/sub/f'] == fr.CONTENT
    source.watch.give_up('the end')


def test_a_file_that_was_not_sent_since_another_step_failed_is_sent_though_size_and_time_are_as_before():
    there, here = (fr.Entry('f', 0o644, 5, 10**18, '', (1, 2), time) for time in (1, 2))
    remote, local = fr.Tree(), fr.Tree()
    for tree, entry in ((remote, there), (local, here)):
        tree.put('', fr.Entry('d', 0o755))
        tree.put('f', entry)
    steps = fr.plan(remote, local, {'f': fr.CONTENT})
    fr.recover(remote, [([fr.Step('meta', '', fr.Entry('d'), 'm', fr.Entry('d', 0o755))], 1), (steps, 2)])
    assert [step.verb for step in fr.plan(remote, local, {'f': fr.LOOK}) if step.path == 'f'] == ['file']


def test_what_comes_while_a_connection_is_made_is_looked_at_and_watched(tmp_path):
    """Else nothing told of what is done through a name in a new directory that is gone when the far side answers."""
    source, far, hold = str(tmp_path / 'src'), str(tmp_path / 'far'), str(tmp_path / 'hold')
    write(source + '/f', 'first')
    waits = 'while [ -e %s ]; do sleep 0.01; done; exec bash' % hold
    with Running(tmp_path, '--debugging', source, far, 'sh', '-c', waits) as running:
        write(hold)
        running.cut()
        until(lambda: running.err().count('connection lost') and running.connections())
        os.mkdir(source + '/d')
        running.says('event d ')
        write(source + '/later')
        running.says('event later')     # by then it was looked at
        os.link(source + '/f', source + '/d/h')
        running.says('event d/h')
        with open(source + '/d/h', 'ab') as file:
            file.write(b' and more')
        shutil.rmtree(source + '/d')
        os.remove(hold)
        until_equal(source, far + '/src', 20, running=running)


@pytest.mark.parametrize('moved', ['f', 'd'])
def test_bytes_that_changed_just_before_a_rename_are_sent(moved, tmp_path):
    """Size and time may be the same, so the rename alone would leave the older bytes there."""
    top = str(tmp_path / 'source')
    write(top + '/f', 'one')
    write(top + '/d/f', 'one')
    source = looked_at(top)
    remote = fr.Tree()
    for step in fr.plan(remote, source.tree, dict.fromkeys(['', *source.tree.below('')], fr.LOOK)):
        assert step.verb != 'move'
    path = {'f': 'f', 'd': 'd/f'}[moved]
    status = os.stat(os.path.join(top, path))
    write(os.path.join(top, path), 'two', mtime_ns=status.st_mtime_ns)
    os.rename(os.path.join(top, moved), top + '/e')
    steps = fr.plan(remote, source.tree, look_again(source))
    assert ('file', {'f': 'e', 'd': 'e/f'}[moved]) in [(step.verb, step.path) for step in steps]
    source.watch.give_up('the end')


@pytest.mark.parametrize('other, size', [('ln -s ../secret f', 4), ('mkfifo f', 4), ('mkdir f', 4), ('ln -s ../secret f', 3000000),
                                         ('mkdir f', 3000000), ('mknod f c 1 5', 4)])
def test_what_is_no_file_any_more_after_the_look_is_not_read(other, size, tmp_path):
    if other.startswith('mknod'):
        fault_root()
    top = str(tmp_path / 'source')
    write(str(tmp_path / 'secret'), bytes(size))
    write(top + '/f', bytes(size))
    source = looked_at(top)
    subprocess.run(['sh', '-c', 'rm f; ' + other], cwd=top, check=True)
    replica = fr.Replica(source.report.options, source, source.report)
    step = fr.Step('file', 'f', source.tree.get('f'))
    if size == 4:
        assert replica.read(step) is None
    else:
        assert list(replica.upload(fr.Job('part1', step))) == []
    assert 'f' in {**source.hints, **source.later}
    source.watch.give_up('the end')


def test_a_file_that_changed_after_the_look_is_read_as_it_is_now(tmp_path):
    top = str(tmp_path / 'source')
    write(top + '/f', 'one', mtime_ns=10**18)
    source, replica = looked_at_with_replica(top)
    step = fr.Step('file', 'f', source.tree.get('f'))
    write(top + '/f', 'longer', mtime_ns=2 * 10**18)
    read, data = replica.read(step)
    assert (data, read.entry.size, read.entry.mtime_ns) == (b'longer', 6, 2 * 10**18)
    assert source.tree.get('f') == replica.remote.get('f') == read.entry
    os.truncate(top + '/f', fr.BULK_BYTES + 1)          # now too large to travel whole
    assert replica.read(step) is None and source.hints == {'f': fr.CONTENT}
    source.watch.give_up('the end')


def test_a_source_that_goes_away_in_the_midst_of_a_look_is_not_a_source_emptied(tmp_path):
    top = str(tmp_path / 'source')
    write(top + '/d/f', mtime_ns=10**18)
    source = looked_at(top)
    check = source.root_is_there

    def there_but_then_gone():
        there = check()
        if os.path.isdir(top):
            os.rename(top, top + '.old')
        return there

    source.root_is_there = there_but_then_gone
    source.hint('', fr.LOOK)
    source.hint('d', fr.LOOK)
    assert source.look() == {} and source.gone and source.tree.get('') is not None
    source.hint('d/f', fr.CONTENT)              # what is hinted at meanwhile is not forgotten
    assert source.look() == {}
    source.root_is_there = check
    os.rename(top + '.old', top)
    source.due(time.monotonic() + 2)
    changed = source.look()
    assert {'', 'd', 'd/f'} <= set(changed) and changed['d/f'] == fr.CONTENT and source.tree.get('d/f') is not None
    source.watch.give_up('the end')


@pytest.mark.parametrize('change', [
    'mv d e', 'mv d/sub sub', 'mv d/sub d/renamed; mv d e',
    'mv d e; mv e/sub e/renamed; mv e f', 'mkdir n; mv d n/; mv n/d/sub n/'
])
def test_a_renamed_directory_is_not_sent_again(change, tmp_path):
    def prepare(source):
        for number in range(50):
            write(os.path.join(source, 'd', 'sub', str(number)), b'%d' % number * 25000)
    count = tmp_path / 'count'
    with Watched(tmp_path, words=counting(['bash'], count), prepare=prepare) as watched:
        before = count.stat().st_size
        watched.sh(change)
        watched.equal()
        assert count.stat().st_size - before < 20000
        assert 'renamed d' in watched.run.out()


@pytest.mark.parametrize('size', [25000, 250000], ids=['small', 'large'])
@pytest.mark.parametrize('new, app, old', [('app.new', 'app', 'app.old'), ('next', 'current', 'previous')])
def test_a_directory_that_is_exchanged_for_another_is_not_sent_again(tmp_path, size, new, app, old):
    def prepare(source):
        for number in range(50):
            for name in (app, new):
                write(os.path.join(source, name, 'sub', str(number)), os.urandom(size), mtime_ns=10**18)
    count = tmp_path / 'count'
    with Watched(tmp_path, words=counting(['bash'], count), prepare=prepare) as watched:
        before, said = count.stat().st_size, watched.run.out()
        watched.sh('mv %s %s; mv %s %s' % (app, old, new, app))
        watched.equal()
        assert count.stat().st_size - before < 40000
        assert len(re.findall('^(?:renamed|sent|removed) ', watched.run.out()[len(said):], re.M)) == 2


@pytest.mark.parametrize('options', [[], ['--poll', '0.3']], ids=['watched', 'polled'])
@pytest.mark.parametrize('cut', [False, True])
def test_a_file_that_another_of_the_same_size_and_time_is_renamed_to_is_sent(tmp_path, options, cut):
    def prepare(source):
        for number, name in enumerate('abc'):
            write('%s/%s' % (source, name), str(number), mtime_ns=10**18)
    with Watched(tmp_path, *options, prepare=prepare) as watched:
        watched.run.process.send_signal(signal.SIGSTOP)
        watched.sh('echo -n 3 >t; touch -d @1000000000 t; mv t c; mv a t; mv b a; mv t b')
        if cut:
            watched.run.cut()
        watched.run.process.send_signal(signal.SIGCONT)
        watched.equal()


@pytest.mark.parametrize('shell', ['bash', 'busybox sh'])
def test_of_a_large_file_only_what_changed_is_sent(tmp_path, shell):
    data = random.Random(0).getrandbits(8 * 20 * 10**6).to_bytes(20 * 10**6, 'big')
    count = tmp_path / 'count'
    with Watched(tmp_path,
                 words=counting(shell_command(tmp_path, shell), count),
                 prepare=lambda source: write(source + '/large', data)) as watched:
        for change in ("printf 'twenty bytes at end\\n' >>large",
                       'printf inside | dd of=large bs=1 seek=9000000 conv=notrunc',
                       'truncate -s 15000000 large'):
            before = count.stat().st_size
            watched.sh(change)
            watched.equal()
            assert count.stat().st_size - before < 10**6


def test_an_edit_does_not_wait_until_all_sums_of_a_large_file_are_made(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/large', FAULT_BIG * 8)
    write(source + '/small', 'first')
    os.mkdir(far)
    connect = shell_command(tmp_path, 'dash')
    fault_command(tmp_path / 'shims-dash', 'sha256sum', '#!/bin/sh\nsleep 0.02\nexec %s\n' % need('sha256sum'))
    with Running(tmp_path, '--debugging', source, far, *connect) as running:
        with open(source + '/large', 'ab') as large:
            large.write(b'more')
        running.says('record base')
        write(source + '/small', 'then')
        until_equal(source, far + '/src', running=running)
        assert running.out().index('sent small (4 bytes') < running.out().rindex('sent large')


def test_a_work_tree_that_hops_between_commits_stays_the_same(tmp_path):
    need('git')

    def prepare(source):
        rng = random.Random(5)
        git = [
            'git', '-C', source, '-c', 'user.name=x', '-c', 'user.email=x@x', '-c', 'core.hooksPath=/dev/null'
        ]
        subprocess.run([*git, 'init', '-q', source], check=True)
        for commit in range(5):
            for _ in range(40):
                path = 'd%d/e%d/f%d' % tuple(rng.randrange(4) for _ in range(3))
                if rng.random() < 0.7:
                    write(os.path.join(source, path),
                          str(rng.random()) * rng.randrange(50), rng.choice([0o644, 0o755]))
                elif os.path.lexists(os.path.join(source, path)):
                    os.unlink(os.path.join(source, path))
            write(os.path.join(source, 'changing%d' % (commit % 2), 'f'), str(commit))
            shutil.rmtree(os.path.join(source, 'changing%d' % ((commit + 1) % 2)), ignore_errors=True)
            subprocess.run([*git, 'add', '-A'], check=True)
            subprocess.run([*git, 'commit', '-q', '-m', 'x'], check=True)
            subprocess.run([*git, 'tag', 'c%d' % commit], check=True)

    def unlike(watched):
        return [line for line in difference(watched.source, watched.replica)
                if not line.startswith(("'.git'", "'.git/", '".git/', "'.':"))]

    with Watched(tmp_path, prepare=prepare) as watched:
        for commit in (0, 3, 1, 4, 2, 0):
            watched.sh('git checkout -q c%d' % commit)
            until(lambda: not unlike(watched), 15, lambda: unlike(watched))
        watched.sh('git checkout -q c1; git checkout -q c4; git checkout -q c0; git checkout -q c3')
        until(lambda: not unlike(watched), 15, lambda: unlike(watched))
        assert not os.path.exists(os.path.join(watched.replica, '.git'))


def test_what_is_changed_during_the_initial_replication_arrives_too(tmp_path):
    source, replica = str(tmp_path / 's'), str(tmp_path / 'd' / 's')
    for number in range(3000):
        write('%s/%d/%d' % (source, number % 30, number), str(number) * 100)
    write(source + '/large', bytes(30 * 10**6))
    with Running(tmp_path, source, tmp_path / 'd', *'sh -c'.split(), 'cat | bash', wait=False) as run:
        rng = random.Random(1)
        for number in range(400):
            path = '%s/%d/%d' % (source, rng.randrange(30), rng.randrange(3000))
            if number % 10 == 0:
                with contextlib.suppress(OSError):
                    os.rename('%s/%d' % (source, rng.randrange(30)), '%s/renamed%d' % (source, number))
            elif number % 10 == 1:
                with open(source + '/large', 'r+b') as file:
                    file.seek(rng.randrange(3 * 10**7))
                    file.write(b'changed')
            elif os.path.exists(os.path.dirname(path)):
                write(path, 'changed %d' % number)
            time.sleep(0.001)           # to spread the edits; nothing is waited for
        until_equal(source, replica, running=run)


@contextlib.contextmanager
def kernel_setting(name, value):
    need_root()
    with open(name) as file:
        before = file.read()
    try:
        with open(name, 'w') as file:
            file.write(str(value))
        yield
    finally:
        with open(name, 'w') as file:
            file.write(before)


QUEUE = '/proc/sys/fs/inotify/max_queued_events'


def test_a_queue_of_events_that_ran_over_is_made_good(tmp_path):
    with contextlib.ExitStack() as stack:
        with kernel_setting(QUEUE, 16):         # taken when the queue is made, so it can go back at once
            watched = stack.enter_context(Watched(tmp_path))
        for number in range(2):
            watched.sh('for i in $(seq 100); do mkdir -p d%d/$i; echo $i >d%d/$i/f; done' % (number, number))
            watched.equal()
        watched.sh('rm -r d0; mv d1 e; for i in $(seq 100); do echo more >>e/$i/f; done')
        watched.equal()
        assert 'lost events' in watched.run.err()


def polls(watched):
    watched.sh('mkdir -p n/e/w; echo new >n/e/w/f; echo more >>f')
    watched.equal()
    watched.sh('mv n m; rm f; ln -s m l')
    watched.equal()


def test_more_directories_than_may_be_watched_are_polled_and_that_is_said_once(tmp_path):
    """The limit is that of a namespace of its own."""
    need_root()
    need('unshare')
    source = tmp_path / 'here' / 'tree'
    for number in range(30):
        write(str(source / str(number) / 'f'))
    limited = [
        'unshare', '-U', '-r', 'sh', '-c', 'echo 10 >/proc/sys/user/max_inotify_watches && exec "$@"', 'sh'
    ]
    out = tmp_path / 'out'
    with open(str(out), 'wb') as file:
        process = subprocess.Popen([*limited, *command(source, tmp_path / 'there', 'bash')],
                                   stdin=subprocess.DEVNULL,
                                   stdout=file,
                                   stderr=file,
                                   start_new_session=True)
    try:
        until_equal(str(source), str(tmp_path / 'there' / 'tree'))
        write(str(source / '29' / 'new'), 'new')
        until_equal(str(source), str(tmp_path / 'there' / 'tree'))
        write(str(source / '3' / 'new'), 'new')
        until_equal(str(source), str(tmp_path / 'there' / 'tree'))
        for number in range(29):        # those that were watched too
            shutil.rmtree(str(source / str(number)))
        until_equal(str(source), str(tmp_path / 'there' / 'tree'))
        said = out.read_text()
        assert said.count('max_user_watches') == 1 and 'is looked at every' in said, said
    finally:
        process.terminate()
        assert process.wait(5) == 0


def test_without_inotify_simple_it_polls_and_says_what_to_install(tmp_path):
    write(str(tmp_path / 'stub' / 'inotify_simple.py'), 'raise ImportError("not here")\n')
    with Watched(tmp_path, env={'PYTHONPATH': str(tmp_path / 'stub')}) as watched:
        polls(watched)
        assert watched.run.err().count('pip install inotify_simple') == 1


def test_where_the_system_has_no_inotify_it_polls_though_inotify_simple_is_installed(tmp_path):
    """As on macOS, where it is found only in use that the C library has no such function."""
    write(str(tmp_path / 'stub' / 'inotify_simple.py'),
          'import enum\nflags = enum.IntFlag("flags", "CLOSE_WRITE CREATE DELETE MOVED_FROM MOVED_TO ATTRIB MODIFY '
          'DELETE_SELF MOVE_SELF ONLYDIR DONT_FOLLOW EXCL_UNLINK")\n'
          'def INotify():\n    import ctypes\n    return ctypes.CDLL(None).inotify_init1_is_not_here\n')
    with Watched(tmp_path, env={'PYTHONPATH': str(tmp_path / 'stub')}) as watched:
        polls(watched)
        assert watched.run.err().count('this system has no inotify') == 1


def test_git_ending_in_between_ends_nothing_else(tmp_path):
    """It does so at paths it does not like."""
    need('git')
    with Watched(tmp_path) as watched:
        for number in range(3):
            watched.sh('echo new >new%d' % number)
            watched.equal()
            for pid in watched.run.connections():
                with open('/proc/%d/cmdline' % pid, 'rb') as file:
                    if b'check-ignore' in file.read():
                        os.kill(pid, signal.SIGKILL)
        assert 'connection lost' not in watched.run.err()


def test_poll_looks_at_everything_at_an_interval(tmp_path):
    with Watched(tmp_path, '--poll', '0.2') as watched:
        polls(watched)
        assert 'inotify_simple' not in watched.run.err()
        until(lambda: write('%s/once/%d' % (watched.source, time.monotonic_ns())) or os.path.isdir(watched.replica + '/once'))
        for number in range(5):         # what changed just before a look is sent again by the next one, and no more
            write('%s/look%d' % (watched.source, number))
            watched.equal()
        assert max(collections.Counter(re.findall(r'sent once/(\d+)', watched.run.out())).values()) < 3


# ==== The connection ========================================================================================

def test_a_connection_that_was_killed_is_made_again_and_what_changed_meanwhile_is_sent(tmp_path):
    up = tmp_path / 'up'
    up.write_bytes(b'')
    words = ['sh', '-c', 'test -e "$0" && exec bash', up]
    with Watched(tmp_path, words=words, prepare=lambda source: write(source + '/d/f', 'old')) as watched:
        for number in range(1, 3):
            up.unlink()
            watched.run.cut()
            watched.sh('echo new >>d/f; echo other >n%d; mv d e; mv e d; rm -f n%d' % (number, number - 1))
            until(lambda: watched.run.err().count('connection lost') == number)
            assert not os.path.exists(os.path.join(watched.replica, 'n%d' % number))
            up.write_bytes(b'')
            watched.equal()
            watched.run.says('connected again')
            until(lambda: watched.run.err().count('connected again') == number)
        assert len(watched.run.err().strip().split(
            '\n')) == 4, watched.run.err()        # one line lost, one line back


@pytest.mark.parametrize('kind', ['bash', 'chroot of busybox', 'ssh bash', 'docker'])
def test_what_was_being_sent_when_the_connection_ended_arrives(kind, request, tmp_path):
    far_side = make_far_side(kind, request, tmp_path)
    source, replica = str(tmp_path / 'tree'), os.path.join(far_side.seen, 'tree')
    for number in range(300):
        write('%s/%d/%d' % (source, number % 7, number), str(number) * 3000)
    write(source + '/large', random.Random(3).getrandbits(8 * 2 * 10**7).to_bytes(2 * 10**7, 'big'))
    with Running(tmp_path, '--wait', source, far_side.parent, *far_side.words, wait=False) as run:
        for number in range(3):
            until(lambda: os.path.isdir(replica) and os.listdir(replica) and run.connections())
            write(source + '/fresh%d' % number, 'x')
            run.cut()
        until_equal(source, replica, whole_seconds=far_side.whole, running=run)


def test_a_container_that_is_made_anew_gets_everything_without_a_restart(docker, tmp_path):
    name, source = 'fr-anew-%d' % os.getpid(), str(tmp_path / 'tree')
    nasty_tree(source)
    try:
        run_container(docker, name, str(tmp_path / 'v1'))
        with Running(tmp_path, source, '/volume', *docker, 'exec', '-i', name, 'sh') as run:
            assert difference(source, str(tmp_path / 'v1' / 'tree'), True) == []
            subprocess.run([*docker, 'rm', '-f', name], stdout=subprocess.DEVNULL, check=True)
            write(source + '/while it was away', 'x')
            run_container(docker, name, str(tmp_path / 'v2'))
            until_equal(source, str(tmp_path / 'v2' / 'tree'), whole_seconds=True, running=run)
            write(source + '/after it was back', 'x')
            until_equal(source, str(tmp_path / 'v2' / 'tree'), whole_seconds=True, running=run)
            assert run.err().count('connection lost') == run.err().count('connected again') == 1
    finally:
        subprocess.run([*docker, 'rm', '-f', name], stdout=subprocess.DEVNULL)


# ==== Churn: random changes, as fast as they come, and a connection that is cut =============================

class Churn:
    """Random operations on a directory, the same for the same seed. Nothing is written through a link."""

    NAMES = [
        b'a', b'b c', b'-rf', b'$(touch pwned)', b"q'uote", b'"d', b'new\nline', b'trail\n', b'\xff\xfe',
        b'back\\slash', b'*', b'.dot', b'..x', b'[b]', b'\x01\x7f', b'e' * 200, b'.file_replicator.x',
        b'file 1 1', b' lead', b'tail ', b'~', b'#', b'='
    ]
    TIMES = [10**18 + 5, -3 * 10**9, 4102444800 * 10**9, 1234567890123456789]

    def __init__(self, root, seed):
        self.root, self.rng = os.fsencode(str(root)), random.Random(seed)
        self.operations = [getattr(self, name) for name in sorted(vars(Churn)) if name.startswith('do_')]
        self.count = 0

    def run(self, times):
        self.count += times
        for _ in range(times):
            self.entries, self.directories = [], [self.root]
            for directory, directories, files in os.walk(self.root):
                self.entries += [os.path.join(directory, name) for name in directories + files]
                self.directories += [path for path in (os.path.join(directory, name) for name in directories)
                                     if not os.path.islink(path)]
            with contextlib.suppress(OSError):
                self.rng.choice(self.operations)()

    def any(self):
        return self.rng.choice(self.entries) if self.entries else self.root + b'/none'

    def new(self):
        number = b'%d' % self.rng.randrange(30) if self.rng.random() < 0.6 else b''
        return os.path.join(self.rng.choice(self.directories), self.rng.choice(self.NAMES) + number)

    def bytes(self, count):
        return self.rng.getrandbits(8 * count).to_bytes(count, 'big') if count else b''

    def write(self, path, data, flags=os.O_CREAT | os.O_TRUNC, at=None):
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | flags, 0o644)
        try:
            if at is not None:
                os.lseek(fd, at, os.SEEK_SET)
            os.write(fd, data)
        finally:
            os.close(fd)

    def do_create(self):
        self.write(self.new(), self.bytes(self.rng.choice([0, 1, 50, 5000, 70000])))

    def do_create_slowly(self):
        path = self.new()
        self.write(path, b'x' * 100)
        time.sleep(0.005)
        self.write(path, b'y' * 100, os.O_APPEND)

    def do_append(self):
        self.write(self.any(), self.bytes(self.rng.choice([1, 100, 3000])), os.O_APPEND)

    def do_rewrite_at_the_same_size(self):
        path = self.any()
        self.write(path, self.bytes(os.lstat(path).st_size))

    def do_write_within(self):
        path = self.any()
        self.write(path, b'12345', 0, self.rng.randrange(os.lstat(path).st_size + 1))

    def do_truncate(self):
        path = self.any()
        if not os.path.islink(path):
            os.truncate(path, self.rng.randrange(os.path.getsize(path) + 1))

    def do_mkdir(self):
        os.mkdir(self.new())

    def do_directories(self):
        path = self.new()
        os.makedirs(path + b'/x/y')
        self.write(path + b'/x/y/f', b'deep')

    def do_rename(self):
        os.rename(self.any(), self.new())

    def do_rename_directory(self):
        path = self.rng.choice(self.directories)
        if path != self.root:
            os.rename(path, self.new())

    def do_replace_by_another_kind(self):
        path = self.any()
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
            self.write(path, b'was a directory')
        else:
            os.unlink(path)
            os.mkdir(path)
            self.write(path + b'/was', b'a file')

    def do_link(self):
        os.symlink(self.rng.choice([b'a', b'/no/such', b'../x', b'dangling\n', b'-l/', b"q'", b'.']),
                   self.new())

    def do_hard_link(self):
        os.link(self.any(), self.new(), follow_symlinks=False)

    def do_chmod(self):
        path = self.any()
        if not os.path.islink(path):
            os.chmod(path, self.rng.choice([0o644, 0o600, 0o755, 0o444, 0o700, 0o640, 0o4755, 0o1777, 0o000]))

    def do_touch(self):
        os.utime(self.any(), ns=(0, self.rng.choice(self.TIMES)), follow_symlinks=False)

    def do_delete(self):
        os.unlink(self.any())

    def do_delete_directory(self):
        path = self.rng.choice(self.directories)
        if path != self.root and self.rng.random() < 0.5:
            shutil.rmtree(path)

    def do_save_atomically(self):
        path = self.any()
        self.write(os.path.dirname(path) + b'/tmp~', self.bytes(100))
        os.rename(os.path.dirname(path) + b'/tmp~', path)


@pytest.mark.parametrize(
    'kind', ['bash', 'dash', 'bash, a tiny queue', 'bash, no tar', 'chroot of busybox', 'ssh bash', 'docker'])
def test_after_random_changes_and_cut_connections_the_replica_is_the_same(kind, request, tmp_path):
    """CHURN_SECONDS is how long (5), SEED replays a run; it is in the test's output, with the figures."""
    kind, tiny, _ = kind.partition(', a tiny queue')
    far_side = make_far_side(kind, request, tmp_path)
    seed = int(os.environ.get('SEED') or random.randrange(10**6))
    seconds = float(os.environ.get('CHURN_SECONDS') or 5)
    print('SEED=%d' % seed)
    source, replica = str(tmp_path / 'tree'), os.path.join(far_side.seen, 'tree')
    os.mkdir(source)
    churn = Churn(source, seed)
    churn.run(100)
    with contextlib.ExitStack() as stack:
        with kernel_setting(QUEUE, 16) if tiny else contextlib.suppress():
            run = stack.enter_context(Running(tmp_path, source, far_side.parent, *far_side.words))
        start, cuts = time.monotonic(), 0
        while time.monotonic() < start + seconds:
            churn.run(churn.rng.randrange(1, 30))
            time.sleep(churn.rng.choice([0, 0, 0.001, 0.01, 0.1]))
            if time.monotonic() > start + min(seconds / 4, 20) * (cuts + 1):
                run.cut()
                cuts += 1
        until_equal(source, replica, 40, far_side.whole, run)
        assert run.stop() == 0
    assert difference(source, replica, far_side.whole) == [], 'SEED=%d' % seed
    print('%d operations, %d cuts, %d overflows, %d bytes sent, differences: 0' % (
        churn.count, cuts, run.err().count('lost events'),
        sum(int(size.replace(',', '')) for size in re.findall(r'\(([\d,]+) bytes, \d+ ms\)', run.out()))))


def test_after_random_changes_while_tools_fail_over_there_the_replica_is_the_same(tmp_path):
    """Each tool fails now and then, without doing anything, while much is on its way; at last all work again."""
    source, far, failing = str(tmp_path / 'tree'), str(tmp_path / 'far'), str(tmp_path / 'failing')
    words = shell_command(tmp_path, 'dash')
    for tool in ('mv', 'rm', 'mkdir', 'rmdir', 'ln', 'chmod', 'touch', 'tar'):
        fault_command(tmp_path / 'shims-dash', tool, '#!/bin/sh\nif [ -e %s ] && [ $(($$ %% 31)) = 0 ]; then\n'
                      'echo "%s: refused" >&2; exit 1; fi\nexec %s "$@"\n' % (failing, tool, need(tool)))
    seed = int(os.environ.get('SEED') or random.randrange(10**6))
    print('SEED=%d' % seed)
    os.mkdir(far)
    os.mkdir(source)
    churn = Churn(source, seed)
    churn.run(100)
    with Running(tmp_path, source, far, *words) as running:
        write(failing)
        end = time.monotonic() + float(os.environ.get('CHURN_SECONDS') or 5)
        while time.monotonic() < end:
            churn.run(churn.rng.randrange(1, 10))
            time.sleep(churn.rng.choice([0, 0.01, 0.05, 0.1]))
        os.remove(failing)
        until_equal(source, far + '/tree', 75, running=running)
        assert running.err().count('refused') > 2


# ==== Command line ==========================================================================================

def test_its_own_output_is_left_out_where_that_goes_into_the_source(tmp_path):
    source, far = tmp_path / 'src', str(tmp_path / 'far')
    write(str(source / 'a'))
    with open(str(source / 'nohup.out'), 'wb') as out:
        process = subprocess.Popen([sys.executable, SCRIPT, str(source), far, 'bash'], stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=subprocess.STDOUT)
    try:
        until(lambda: 'in step' in (source / 'nohup.out').read_text(), 20)
        write(str(source / 'b'))
        until(lambda: os.path.exists(far + '/src/b'), 10)
        assert sorted(os.listdir(far + '/src')) == ['a', 'b']
        assert 'nohup.out: is left out: it is our' in (source / 'nohup.out').read_text()
    finally:
        process.terminate()
        assert process.wait(5) == 0


def test_a_log_file_that_is_moved_away_is_made_again(tmp_path):
    log, other = tmp_path / 'log', tmp_path / 'log.1'
    write(str(tmp_path / 'src/a'))
    with Running(tmp_path, '--log-file', str(log), tmp_path / 'src', tmp_path / 'far', 'bash') as running:
        os.rename(str(log), str(other))
        write(str(tmp_path / 'src/b'))
        until(lambda: log.exists() and 'sent b' in log.read_text(), 10, running.log)
    assert 'sent a' in other.read_text() and 'sent b' not in other.read_text()


@pytest.fixture
def tree(tmp_path):
    """tmp_path/src with two files, and tmp_path/dst."""
    write(str(tmp_path / 'src' / 'a'), 'a')
    write(str(tmp_path / 'src' / 'sub' / '.b'), 'b')
    (tmp_path / 'dst').mkdir()
    return tmp_path


@pytest.mark.parametrize(
    'words',
    [[], ['{}/src'], ['{}/src', '{}/dst'], ['{}/src', '{}/dst', '--'], ['{}/src', 'dst', 'bash'],
     ['{}/src', './dst', 'bash'], ['{}/src', '~/dst', 'bash'], ['{}/src', '', 'bash'],
     ['{}/none', '{}/dst', 'bash'], ['{}/src/a', '{}/dst', 'bash'], ['/', '{}/dst', 'bash'],
     ['--no-such-option', '{}/src', '{}/dst', 'bash'], ['--poll', '0', '{}/src', '{}/dst', 'bash'],
     ['--poll', '{}/src', '{}/dst', 'bash'], ['--exclude', '', '{}/src', '{}/dst', 'bash'], ['--exclude'],
     ['--exclude', './sub', '{}/src', '{}/dst', 'bash'], ['--exclude', 'sub/../a', '{}/src', '{}/dst', 'bash'],
     ['--clean-out-first', '--no-initial-replication', '{}/src', '{}/dst', 'bash'],
     ['', '{}/dst', 'bash'], ['{}/src', '', 'bash'], ['{}/src', '{}/dst', '']],
    ids=' '.join)
def test_a_wrong_command_line_is_refused_with_status_2(words, tree):
    done = once(*(word.replace('{}', str(tree)) for word in words), expect=2)
    assert done.stdout == '' and 'error: ' in done.stderr
    assert os.listdir(str(tree / 'dst')) == []


@pytest.mark.parametrize('words, says',
                         [(['false'], 'status 1'), (['true'], 'no shell'),
                          (['no-such-command'], 'cannot run'), (['sh', '-c', 'exit 127'], '127'),
                          (['sh', '-c', 'echo the engine is away >&2; exit 125'], 'the engine is away'),
                          (['cat'], 'no shell')],
                         ids=str)
def test_a_connection_that_never_was_ends_it_with_status_1_and_what_was_said(words, says, tree):
    done = once(tree / 'src', tree / 'dst', *words, expect=1, timeout=15)
    assert says in done.stderr.strip().split('\n')[-1], done.stderr


@pytest.mark.parametrize('parent', ['{}/src/a', '/proc/none', '/dev/null/x'])
def test_a_destination_that_cannot_be_made_ends_it_with_status_1(parent, tree):
    assert 'cannot make the directory' in once(tree / 'src',
                                               parent.replace('{}', str(tree)),
                                               'bash',
                                               expect=1).stderr


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_as_asked_it_ends_with_status_0_and_leaves_nothing_behind(number, tree):
    with Running(tree, tree / 'src', tree / 'dst', 'bash') as run:
        connections = run.connections()
        assert run.stop(number) == 0
    assert run.err() == ''
    assert difference(str(tree / 'src'), str(tree / 'dst' / 'src')) == []
    assert not any(os.path.exists('/proc/%d' % pid) for pid in connections)


def test_it_says_its_version_and_shows_how_it_is_used():
    assert once('--version').stdout == 'file_replicator %s\n' % fr.__version__
    text = once('--help').stdout
    for words in ('ssh ', 'docker exec -i', 'docker-compose exec -T', 'kubectl exec -i', '--clean-out-first',
                  '--with-initial-replication', '--no-initial-replication', '--replicate-on-change',
                  '--no-replicate-on-change', '--no-delete', '--mirror'):
        assert words in text


@pytest.mark.parametrize('named, at, name', [('.', 'src', 'src'), ('./', 'src', 'src'),
                                             ('../src/', 'src', 'src'), ('src//', '', 'src'),
                                             ('src/sub/..', '', 'src'), ('link', '', 'link'),
                                             ('link/', '', 'link'), ('..', 'src/sub', 'src')])
def test_the_replica_is_called_as_the_source_is(named, at, name, tree):
    (tree / 'link').symlink_to('src')
    with Running(tree, named, tree / 'dst', 'bash', cwd=str(tree / at)) as run:
        assert os.listdir(str(tree / 'dst')) == [name]
        write(str(tree / 'src' / 'new'), 'new')
        until_equal(str(tree / 'src'), str(tree / 'dst' / name), running=run)


@pytest.mark.parametrize('between', [[], ['--']])
@pytest.mark.parametrize(
    'words',
    [['sh'], ['exec', '-i', 'pod', '-c', 'main', '--', 'sh'], ['--', 'sh', '--', '-x'], ['--', '--'], ['-'],
     ['--debugging', '--help', '--version', '--mirror'], ['a b', "q'", '$x', '', '*', 'new\nline', 'é']],
    ids=' '.join)
def test_the_connection_command_reaches_the_process_untouched(words, between, tree):
    connect = str(tree / 'connect')
    write(connect, '#!/bin/sh\nprintf "%%s\\0" "$@" >%s/seen\nexec bash\n' % tree, 0o755)
    once('--no-replicate-on-change', tree / 'src', tree / 'dst', *between, connect, *words)
    assert (tree / 'seen').read_bytes() == b''.join(os.fsencode(word) + b'\0' for word in words)
    assert difference(str(tree / 'src'), str(tree / 'dst' / 'src')) == []


def test_options_may_stand_between_and_behind_the_two_places(tree):
    once(tree / 'src', '--no-replicate-on-change', tree / 'dst', '--exclude', 'sub', '--', 'bash')
    assert os.listdir(str(tree / 'dst' / 'src')) == ['a']


@pytest.mark.parametrize('name', [
    'a b', "q'uote", '"', '$HOME', '$(touch pwned)', '`x`', '-rf', '*', '[a]', 'back\\slash', '~', '#',
    'new\nline', ' ', 'trail ', 'ends\n', 'é', '\udcff', 'a/b/c', '!', '&;|', '%s'
],
                         ids=repr)
def test_any_destination_path_will_do(name, tree):
    parent, source = os.path.join(str(tree / 'dst'), name), os.path.join(str(tree), name.replace('/', '-'))
    os.rename(str(tree / 'src'), source)
    for shell in ('bash', 'busybox sh'):
        write(os.path.join(source, 'for ' + shell))
        once('--no-replicate-on-change', '--', source, parent, *shell.split())
        assert difference(source, os.path.join(parent, os.path.basename(source))) == []
    assert not os.path.exists(str(tree / 'pwned'))


@pytest.mark.parametrize(
    'options',
    [[], ['--clean-out-first'], ['--mirror'], ['--no-initial-replication'], ['--no-replicate-on-change']],
    ids=str)
@pytest.mark.parametrize('source, parent', [('p/x', 'p'), ('p/x', 'p/x'), ('p/x', 'p/x/sub'), ('p/x/x', 'p'),
                                            ('p/x', 'p/x/new'), ('link', 'p/x/sub'), ('p/x', 'to_p'),
                                            ('p/x/sub/x', 'p')])
def test_a_replica_that_overlaps_its_source_is_refused_and_nothing_is_lost(source, parent, options, tmp_path):
    for path in ('a', 'sub/b', 'x/c', 'sub/x/.d'):
        write(str(tmp_path / 'p' / 'x' / path), path)
    (tmp_path / 'link').symlink_to('p/x')
    (tmp_path / 'to_p').symlink_to('p')
    before = {path: entry[:2] + entry[3:] for path, entry in tree_of(str(tmp_path / 'p')).items()}
    done = once(*options, tmp_path / source, tmp_path / parent, 'bash', expect=None, timeout=20)
    after = {path: entry[:2] + entry[3:] for path, entry in tree_of(str(tmp_path / 'p')).items()}
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if '.file_replicator' in path]
    assert done.returncode in (1, 2) and 'choose another destination' in done.stderr, (done.returncode,
                                                                                       done.stderr)


def test_clean_out_first_empties_the_replica_and_keeps_the_directory_itself(tree):
    replica = tree / 'dst' / 'src'
    for path in ('.dot', '..x', 'a/in the way', 'locked/f', '-rf', 'new\nline'):
        write(str(replica / path), path)
    (replica / 'out').symlink_to(tree / 'src')
    (replica / 'locked').chmod(0)
    inode = replica.stat().st_ino
    once('--clean-out-first', '--no-replicate-on-change', tree / 'src', tree / 'dst', 'bash')
    assert replica.stat().st_ino == inode
    assert difference(str(tree / 'src'), str(replica)) == []
    assert (tree / 'src' / 'a').read_bytes() == b'a'


@pytest.mark.parametrize('option', ['--mirror', '--clean-out-first'])
def test_what_it_removes_over_there_is_not_its_own_staging(option, tree):
    done = once(option, '--no-replicate-on-change', tree / 'src', tree / 'dst', 'bash')
    assert done.stderr == '' and 'removed' not in done.stdout


@pytest.mark.parametrize('option', ['', '--no-delete', '--mirror'])
def test_what_is_removed_over_there(option, tree):
    """By default what went here; with --mirror what is not here; with --no-delete nothing."""
    replica = tree / 'dst' / 'src'
    write(str(replica / 'theirs'), 'theirs')
    write(str(replica / 'their directory' / '.f'), 'theirs')
    write(str(replica / 'kept.o'), 'left out')
    with Running(tree, *[option] * bool(option), '--exclude', '*.o', tree / 'src', tree / 'dst',
                 'bash') as run:
        shutil.rmtree(str(tree / 'src' / 'sub'))
        (tree / 'src' / 'a').rename(tree / 'src' / 'b')
        until(
            lambda: (replica / 'b').exists() and (option == '--no-delete' or not (replica / 'sub').exists()),
            10, run.log)
        run.in_step(2)
        theirs = set() if option == '--mirror' else {'theirs', 'their directory'}
        assert set(os.listdir(
            str(replica))) == {'b', 'kept.o'} | theirs | ({'a', 'sub'} if option == '--no-delete' else set())


def test_a_directory_that_holds_something_of_theirs_stays_and_that_is_said_once(tree):
    replica = tree / 'dst' / 'src'
    words = shell_command(tree, 'dash')     # where the tools speak German, if they may
    fault_command(tree / 'shims-dash', 'rmdir', '#!/bin/sh\n[ "$LC_ALL" = C ] || { echo "rmdir: Verzeichnis nicht leer"; exit 1; }\n'
                  'exec %s "$@"\n' % need('rmdir'))
    with Running(tree, tree / 'src', tree / 'dst', *words, env={'LC_ALL': 'de_DE.UTF-8'}) as run:
        write(str(replica / 'sub' / 'theirs'), 'theirs')
        shutil.rmtree(str(tree / 'src' / 'sub'))
        run.says('stays over there')
        write(str(tree / 'src' / 'new'))
        until(lambda: (replica / 'new').exists())
        assert os.listdir(str(replica / 'sub')) == ['theirs']
        assert run.err().count('stays over there') == 1 and run.out().count('in step') >= 2


def test_a_directory_in_the_way_of_a_file_that_may_not_go_is_said_once_and_as_what_it_is(tree):
    replica = tree / 'dst' / 'src'
    with Running(tree, '--no-delete', tree / 'src', tree / 'dst', 'bash') as run:
        inside = set(os.listdir(str(replica / 'sub')))
        shutil.rmtree(str(tree / 'src' / 'sub'))
        write(str(tree / 'src' / 'sub'), 'a file')
        run.says('not in step')
        write(str(tree / 'src' / 'new'))
        until(lambda: (replica / 'new').exists())
        assert inside and set(os.listdir(str(replica / 'sub'))) == inside
        assert run.err().count('not empty') == 1 and 'stays over there' not in run.err(), run.err()
        shutil.rmtree(str(replica / 'sub'))
        until(lambda: fault_holds(str(replica), 'sub', b'a file'), 30, run.log)


def test_without_initial_replication_only_what_changes_is_sent(tree):
    with Running(tree, '--no-initial-replication', tree / 'src', tree / 'dst', 'bash') as run:
        assert os.listdir(str(tree / 'dst' / 'src')) == []
        assert 'in step, but for 3 paths that differed at the start\n' in run.out()
        write(str(tree / 'src' / 'sub' / 'new'), 'new')
        until(lambda: (tree / 'dst' / 'src' / 'sub' / 'new').exists(), 10, run.log)
        run.in_step(2)
        assert set(tree_of(str(tree / 'dst' / 'src'))) == {'.', 'sub', 'sub/new'}
        write(str(tree / 'other'), 'other')
        run.process.send_signal(signal.SIGSTOP)         # so that it sees all this at once
        run.cut()                       # nor after a new connection
        write(str(tree / 'src' / 'meanwhile'), 'new')
        os.rename(str(tree / 'other'), str(tree / 'src' / 'a'))
        run.process.send_signal(signal.SIGCONT)
        until(lambda: (tree / 'dst' / 'src' / 'meanwhile').exists(), 10, run.log)
        run.in_step(3)
        assert set(tree_of(str(tree / 'dst' / 'src'))) == {'.', 'a', 'sub', 'sub/new', 'meanwhile'}
        there = tree / 'dst' / 'src' / 'sub' / '.b'
        write(str(tree / 'src' / 'sub' / '.b'), 'changed')
        until(there.exists, 10, run.log)
        run.in_step(4)
        there.unlink()                  # from then on it is sent again where it is missing
        run.cut()
        until(there.exists, 10, run.log)


def test_each_confirmed_path_is_a_line_and_then_it_is_in_step(tree):
    write(str(tree / 'src' / 'esc\x1b[31m\n'), bytes(1234))
    for locale in ('C', 'C.UTF-8'):
        shutil.rmtree(str(tree / 'dst'))
        lines = once('--no-replicate-on-change', tree / 'src', tree / 'dst', 'bash', env={
            'LC_ALL': locale
        }).stdout.split('\n')
        assert sorted(re.sub(r'\d+ ms', 'N ms', line) for line in lines[:-2]) == [
            'made sub/ (N ms)', 'sent a (1 bytes, N ms)', 'sent esc\\x1b[31m\\n (1,234 bytes, N ms)',
            'sent sub/.b (1 bytes, N ms)'
        ]
        assert lines[-2:] == ['in step', '']


def test_a_path_is_shown_so_that_any_terminal_can_show_it_and_no_two_look_alike(tree):
    for name in ('\xfc', 'a\nb', 'a\\nb', '\udcff'):
        write(str(tree / 'src' / name))
    out = once('--no-replicate-on-change', tree / 'src', tree / 'dst', 'bash', env={'PYTHONIOENCODING': 'ascii'}).stdout
    assert {'\\xfc', 'a\\nb', 'a\\\\nb', '\\xff'} <= set(option_lines(out, 'sent'))


def test_debugging_shows_events_steps_and_records(tree):
    with Running(tree, '--debugging', tree / 'src', tree / 'dst', 'bash') as run:
        write(str(tree / 'src' / 'new'), 'new')
        until_equal(str(tree / 'src'), str(tree / 'dst' / 'src'), running=run)
    for words in ('debug: ', ' event new ', ' record file ', ' answer '):
        assert words in run.err()


FAULT_SHELLS = ['bash', 'dash', 'busybox sh']
fault_in_each_shell = pytest.mark.parametrize('shell', FAULT_SHELLS)
FAULT_ROOM_SECONDS = 60         # once a fault is mended, what it kept back arrives within this
FAULT_SILENT_SECONDS = 45       # what should answer and does not is noticed within this
FAULT_STOP_SECONDS = 1.0


def fault_root():
    """For what only root can set up: mounts, other users."""
    if os.geteuid() != 0:
        (pytest.fail if os.environ.get('REQUIRE_ALL') == '1' else pytest.skip)('needs root')


@pytest.fixture
def fault_open(request):
    """A directory that other users may enter, which pytest's own are not. What is mounted in it is unmounted."""
    directory = tempfile.mkdtemp(prefix='fault.', dir='/tmp')
    os.chmod(directory, 0o755)
    yield directory
    with open('/proc/self/mounts') as file:
        mounts = [line.split()[1] for line in file if line.split()[1].startswith(directory + '/')]
    for mount in reversed(mounts):
        subprocess.run(['umount', '-l', mount], check=True)
    subprocess.run(['rm', '-rf', directory], check=True)


@contextlib.contextmanager
def fault_mount(at, *words):
    """Something mounted at a path for a while: fault_mount(at, '-t', 'tmpfs', ...) or fault_mount(at, '--bind', from)."""
    fault_root()
    if words[0] != '--bind':
        os.makedirs(at, exist_ok=True)
    subprocess.run(['mount', *words, at] if words[0] == '--bind' else ['mount', *words, 'none', at], check=True)
    try:
        yield at
    finally:
        subprocess.run(['umount', '-l', at], check=True)


def fault_tmpfs(at, options):
    return fault_mount(at, '-t', 'tmpfs', '-o', options)


def fault_through(monkeypatch, tmp_path, *words):
    """From now on the program is started through this command, which has to exec what follows it."""
    path = str(tmp_path / ('through.%d' % time.monotonic_ns()))
    write(path, '#!/bin/sh\nexec %s %s "$@"\n' % (' '.join(map(shlex.quote, words)), shlex.quote(sys.executable)), 0o755)
    monkeypatch.setattr(sys, 'executable', path)


def fault_other_number(monkeypatch, tmp_path, words, others):
    """From now on it is a copy of the program that is started: a number in it is smaller, so that a test need not be long."""
    with open(SCRIPT, encoding='utf-8') as file:
        text = file.read()
    assert text.count(words) == 1
    write(str(tmp_path / 'copy.py'), text.replace(words, others))
    monkeypatch.setattr(sys.modules[__name__], 'SCRIPT', str(tmp_path / 'copy.py'))


@pytest.fixture
def fault_not_root(tmp_path, monkeypatch):
    """The program runs as somebody whom permissions stop: root without what root may override."""
    if os.geteuid() == 0:
        need('setpriv')
        fault_through(monkeypatch, tmp_path, 'setpriv', '--bounding-set', '-dac_override,-dac_read_search')


def fault_other_user(directory, shell='bash'):
    """A connection command that ends at an ordinary user."""
    fault_root()
    need('setpriv')
    ids = ['setpriv', '--reuid', '65534', '--regid', '65534', '--clear-groups']
    return [*ids, *shell_command(directory, shell)]


def fault_give(*paths):
    for path in paths:
        os.chown(path, 65534, 65534, follow_symlinks=False)


def fault_fill(directory, leave=0):
    """Fills a small file system but for `leave` bytes; removing the file this returns makes room again."""
    path = os.path.join(directory, 'ballast')
    with open(path, 'wb', buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b'x' * 4096)
    if leave:
        os.truncate(path, os.path.getsize(path) - leave)
    return path


def fault_staging(replica):
    """What of ours stands there that should not."""
    return [os.path.join(d, name) for d, directories, files in os.walk(replica) for name in directories + files
            if fr.STAGING.fullmatch(name)]


def fault_processes(word):
    """The processes that have this in their command line: receivers hold the path of the replica in theirs."""
    found = []
    for pid in os.listdir('/proc'):
        if pid.isdigit() and int(pid) != os.getpid():
            with contextlib.suppress(OSError), open('/proc/%s/cmdline' % pid, 'rb') as file:
                if os.fsencode(str(word)) in file.read():
                    found.append(int(pid))
    return found


def fault_nothing_left(replica, within=3.0):
    until(lambda: not fault_processes(replica), within, lambda: 'processes %s' % fault_processes(replica))
    until(lambda: not fault_staging(replica), within, lambda: 'staging %s' % fault_staging(replica))


def fault_holds(directory, name, data):
    with contextlib.suppress(OSError), open(os.path.join(directory, name), 'rb') as file:
        return file.read() == data


def fault_victim(directory):
    """A directory that nothing may touch, and what is in it, to compare with later."""
    victim = os.path.join(str(directory), 'victim')
    write(victim + '/file', 'precious', 0o640, 10**18)
    write(victim + '/inside/deep', 'precious too')
    os.mkdir(victim + '/empty')
    os.symlink('file', victim + '/link')
    return victim, tree_of(victim)


def fault_command(directory, name, text):
    """An executable script; its name."""
    path = os.path.join(str(directory), name)
    write(path, text, 0o755)
    return path


def fault_python(directory, name, text):
    return fault_command(directory, name, '#!%s\nimport os, re, select, signal, subprocess, sys, threading, time\n%s'
                         % (sys.executable, text))


# A connection that a test controls by files: `armed` holds how many more bytes it passes on before it dies, `mute`
# has it close its output, `slow` is the seconds it rests after each 16 KiB.
FAULT_RELAY = '''
at = os.path.dirname(os.path.abspath(sys.argv[0]))
far = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, bufsize=0)
def number(name):
    try:
        return float(open(os.path.join(at, name)).read())
    except (OSError, ValueError):
        return None
left = None
def die():
    far.kill()
    os._exit(9)
def watch():
    while True:
        if number('mute') is not None and far.poll() is None:
            os.remove(os.path.join(at, 'mute'))
            os.close(1)
            far.kill()
            time.sleep(1000)
        if far.poll() is not None:
            os._exit(far.returncode & 255)
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
slow = number('slow')
while True:
    data = os.read(0, 16384)
    if not data:
        break
    left = number('armed') if left is None else left
    if left is not None and len(data) >= left:
        far.stdin.write(data[:int(left)])
        far.stdin.close()
        far.wait()
        os.remove(os.path.join(at, 'armed'))
        os._exit(9)
    left = left if left is None else left - len(data)
    while data:
        data = data[far.stdin.write(data):]
    if slow:
        time.sleep(slow)
far.stdin.close()
far.wait()
'''


def fault_relay(directory, *far, slow=None):
    path = fault_python(os.path.join(str(directory), 'relay.%d' % time.monotonic_ns()), 'relay', FAULT_RELAY)
    if slow:
        write(os.path.join(os.path.dirname(path), 'slow'), str(slow))
    return [path, *far], os.path.dirname(path)


def fault_together(jobs, work, at_once=4):
    """Runs work(*job) for all jobs, a few at once; the failures of all are shown."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        failures = []
        for job, future in [(job, pool.submit(work, *job)) for job in jobs]:
            try:
                future.result()
            except (Exception, pytest.fail.Exception) as error:
                failures.append('%r: %s' % (job, error))
    assert not failures, '\n\n'.join(failures)


# ---- the far disk is full

FAULT_BIG = random.Random(1).randbytes(6 << 20) if sys.version_info >= (3, 9) else os.urandom(6 << 20)

#       name: (file system, room that is left, what is there before, what is made, what is named, what arrives at once)
FAULT_FULL = {
    'a big file': ('size=12m', 3 << 20, {}, {'big': FAULT_BIG, 'small': b'fits'}, 'big', 'small'),
    'a small file': ('size=4m', 0, {'old': b''}, {'small': b'x' * 9000, 'empty': b''}, 'small', 'empty'),
    'a bulk of files': ('size=4m', 128 << 10, {},
                        dict({'d/%03d' % i: b'y' * 9000 for i in range(60)}, **{'d/empty': b''}), r'd/\d\d\d', 'd/empty'),
    'a patch': ('size=14m', 1 << 20, {'big': FAULT_BIG}, {'big': FAULT_BIG[:-9] + b'different', 'small': b'fits'}, 'big', 'small'),
    'a directory': ('size=4m,nr_inodes=10', None, {}, {'m%02d/n' % i: b'' for i in range(9)}, 'm08', ''),
    'files without inodes': ('size=4m,nr_inodes=10', None, {'old': b''},
                             {'f%02d' % i: b'' for i in range(12)}, 'f11', ''),
}


@fault_in_each_shell
def test_a_full_disk_names_what_does_not_fit_and_it_arrives_once_there_is_room(fault_open, shell):
    tmp = fault_open
    with contextlib.ExitStack() as stack:
        runs = []
        for number, (what, (options, leave, before, after, named, arrives)) in enumerate(FAULT_FULL.items()):
            source, far = '%s/%d/src' % (tmp, number), '%s/%d/far' % (tmp, number)
            stack.enter_context(fault_tmpfs(far, options))
            os.makedirs(source)
            for name, data in before.items():
                write(os.path.join(source, name), data)
            write(source + '/to-go', 'soon gone')
            runs.append((what, source, far, leave, after, named, arrives, stack.enter_context(
                Running(tmp, source, far, *shell_command(tmp, shell), wait=False))))
        for what, source, far, leave, after, named, arrives, running in runs:
            running.in_step()
            if leave is not None:
                fault_fill(far, leave)
            for name, data in after.items():        # by rename: a file cut to nothing first would make room there
                os.makedirs(os.path.dirname(os.path.join(source, name)), exist_ok=True)
                write(os.path.dirname(source) + '/made', data)
                os.rename(os.path.dirname(source) + '/made', os.path.join(source, name))
            os.remove(source + '/to-go')
        for what, source, far, leave, after, named, arrives, running in runs:
            try:
                running.says('No space left on device')
                until(lambda: re.search(r'file_replicator: [^\n]*%s' % (named if leave is not None else named[0] + r'\d\d'),
                                        running.err()), 20, running.err)
                until(lambda: not os.path.exists(far + '/src/to-go'))
                until(lambda: not arrives or fault_holds(far, 'src/' + arrives, after[arrives]), 20, running.log)
                running.says('not in step')
                assert running.out().splitlines()[-1] != 'in step'
            except BaseException:
                print('while', what, 'met a full disk')
                raise
        for what, source, far, leave, after, named, arrives, running in runs:
            if leave is None:
                subprocess.run(['mount', '-o', 'remount,size=9m,nr_inodes=1000', far], check=True)
            else:
                os.remove(far + '/ballast')
        for what, source, far, leave, after, named, arrives, running in runs:
            until_equal(source, far + '/src', FAULT_ROOM_SECONDS, running=running)
            until(lambda: running.out().splitlines()[-1] == 'in step', 20, running.log)
        for *_, running in runs:
            assert running.stop() == 0
        for what, source, far, *_ in runs:
            assert not fault_staging(far)


def test_on_a_full_disk_edits_do_not_wait_each_time_that_a_large_file_is_tried_again(fault_open):
    tmp, source = fault_open, fault_open + '/src'
    write(source + '/edited', '')
    with fault_tmpfs(tmp + '/far', 'size=30m'), Running(tmp, source, tmp + '/far', 'dash') as running:
        write(source + '/big', FAULT_BIG * 10)
        running.says('No space left on device', 60)
        end, number = time.monotonic() + 8, 0
        while time.monotonic() < end:           # it is tried again after 1, 3 and 7 seconds
            number += 1
            write(source + '/edited', str(number))
            until(lambda: fault_holds(tmp + '/far', 'src/edited', str(number).encode()), 3, running.log)


@pytest.mark.parametrize('before, after, named', [
    ({}, {'big': FAULT_BIG, 'a/small': b'fits'}, ['big']),
    ({}, dict({'a/%03d' % i: b'y' * 9000 for i in range(600)}, **{'a/small': b''}), ['a/599']),
    ({'a/small': b'fits'}, {'a/small': b'fits', 'b1': b'z' * 900000, 'b2': b'z' * 990000, 'b3': b'z' * 950000}, ['b3']),
], ids=['a big file', 'a bulk of files', 'files'])
def test_one_shot_onto_a_full_disk_ends_with_status_1_and_the_names(fault_open, before, after, named):
    tmp, source = fault_open, fault_open + '/src'
    for name, data in dict(before, **after).items():
        write(os.path.join(source, name), data)
    with fault_tmpfs(tmp + '/far', 'size=2m'):
        done = once('--no-replicate-on-change', source, tmp + '/far', *shell_command(tmp, 'dash'), expect=1)
        for name in named:
            assert re.search('file_replicator: %s: .*No space left' % name, done.stderr), done.stderr
        assert 'in step' not in done.stdout
        there, here = tree_of(tmp + '/far/src'), tree_of(source)
        assert there['a/small'] == here['a/small']
        assert all(there[path][3] == here[path][3] for path in there), 'a file is there in part'
        assert not fault_staging(tmp + '/far')


@fault_in_each_shell
def test_what_failed_among_many_files_turns_up_nowhere_else_and_never_in_part(tmp_path, shell):
    """One is larger than may be written there, one has a directory of theirs in its way; the others are told from both."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for directory, count in (('a', 700), ('b', 400), ('c', 1000)):
        for i in range(count):
            write('%s/%s/%d' % (source, directory, i), '%s %d' % (directory, i))
    write(source + '/a/large', FAULT_BIG[:900000])
    write(source + '/b/way', 'ours')
    write(far + '/src/b/way/theirs', 'theirs')
    done = once('--no-replicate-on-change', source, far, 'sh', '-c', 'trap "" XFSZ; ulimit -f 1000; exec "$@"', '-',
                *shell_command(tmp_path, shell), expect=1)
    assert 'a/large: ' in done.stderr and 'b/way: ' in done.stderr
    files = [{path: data for path, (kind, *_, data) in tree_of(root).items() if kind == stat.S_IFREG}
             for root in (source, far + '/src')]
    del files[0]['a/large'], files[0]['b/way'], files[1]['b/way/theirs']
    assert files[0] == files[1]


def test_what_cannot_be_removed_keeps_nothing_else_and_is_named_and_tried_ever_more_seldom(tmp_path):
    source, far, tried = (str(tmp_path / name) for name in ('src', 'far', 'tried'))
    connect = shell_command(tmp_path, 'dash')
    fault_command(tmp_path / 'shims-dash', 'rm', '#!/bin/sh\ncase "$*" in *./bad*) date +%%s.%%N >>%s; echo refused; exit 1 ;; esac\n'
                  'exec %s "$@"\n' % (tried, need('rm')))
    for name in ('bad', 'good'):
        write(os.path.join(source, name), name)
    os.mkdir(far)
    with Running(tmp_path, source, far, *connect) as running:
        running.process.send_signal(signal.SIGSTOP)     # so that both go in one record
        for name in ('bad', 'good'):
            os.remove(os.path.join(source, name))
        running.process.send_signal(signal.SIGCONT)
        until(lambda: not os.path.exists(far + '/src/good') and 'bad: refused' in running.err(), 5, running.log)
        # each time twice: among directories perhaps, and for the reason
        times = until(lambda: len(open(tried).readlines()) > 7 and list(map(float, open(tried)))[::2], 15, running.log)
        assert times[3] - times[2] > (times[2] - times[1]) * 1.5, times      # the first was with the other, the next at once


@pytest.mark.parametrize('shell', ['bash', 'dash'])
@pytest.mark.parametrize('tool, fails, status', [('tee', 'exec cat', 0), ('dd', 'case $* in *notrunc*) cat >/dev/null; exit 1 ;; esac', 1)])
def test_a_patch_that_could_not_be_written_there_is_never_put_in_place(tmp_path, shell, tool, fails, status):
    """A disk that is full while the old blocks are copied (then all is sent), or bad where a new one goes."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(far + '/src/large', FAULT_BIG)
    write(source + '/large', FAULT_BIG[:-9] + b'different', mtime_ns=10**18)
    connect = shell_command(tmp_path, shell)
    fault_command(tmp_path / ('shims-' + shell), tool, '#!/bin/sh\n%s\nexec %s "$@"\n' % (fails, need(tool)))
    done = once('--no-replicate-on-change', source, far, *connect, expect=status)
    assert fault_holds(far, 'src/large', FAULT_BIG if status else FAULT_BIG[:-9] + b'different')
    assert bool(status) == ('large: ' in done.stderr)


@pytest.mark.parametrize('shell', ['bash', 'dash'])
def test_a_file_of_which_a_tool_took_only_a_part_without_saying_so_is_never_put_in_place(tmp_path, shell):
    source, far, failing = str(tmp_path / 'src'), str(tmp_path / 'far'), str(tmp_path / 'failing')
    write(source + '/file', 'old')
    os.mkdir(far)
    connect = shell_command(tmp_path, shell)
    fault_command(tmp_path / ('shims-' + shell), 'dd', '#!/bin/sh\n[ -e %s ] || exec %s "$@"\nexec head -c 10\n' % (
        failing, need('dd')))
    with Running(tmp_path, source, far, *connect) as running:
        write(failing)
        write(source + '/file', 'more than ten bytes\n' * 9)
        running.says('file: it could not be done over there')
        assert fault_holds(far, 'src/file', b'old')
        os.remove(failing)
        until_equal(source, far + '/src', running=running)


# ---- what the far side may not do

@fault_in_each_shell
def test_what_an_ordinary_user_may_not_write_is_named_and_the_rest_arrives(fault_open, shell):
    tmp, source, replica = fault_open, fault_open + '/src', fault_open + '/far/src'
    os.makedirs(replica + '/closed')
    write(source + '/closed/within', 'cannot be written')
    write(source + '/theirs', 'same', 0o600, 10**18)
    write(replica + '/theirs', 'same', 0o644, 10**18)
    write(source + '/d/fine', 'arrives')
    fault_give(tmp + '/far', replica)
    with Running(tmp, source, tmp + '/far', *fault_other_user(tmp, shell), wait=False) as running:
        running.says('not in step')
        for name, why in (('closed/within', 'ermission denied'), ('theirs', 'not permitted')):
            assert re.search('file_replicator: %s: .*%s' % (name, why), running.err()), running.err()
        assert tree_of(source + '/d') == tree_of(replica + '/d')
        write(source + '/later', 'on it goes')
        until(lambda: os.path.exists(replica + '/later'))
        fault_give(replica + '/closed', replica + '/theirs')
        until_equal(source, replica, FAULT_ROOM_SECONDS, running=running)


@fault_in_each_shell
def test_a_read_only_directory_of_ours_is_written_all_the_same_and_stays_read_only(fault_open, shell):
    tmp, source, replica = fault_open, fault_open + '/src', fault_open + '/far/src'
    os.mkdir(tmp + '/far')
    fault_give(tmp + '/far')
    for name in ('one', 'two/three', 'two/four'):
        write(source + '/ro/' + name, name, 0o444)
    os.chmod(source + '/ro/two', 0o500)
    os.chmod(source + '/ro', 0o555)
    write(source + '/locked', 'nobody reads this', 0o000)
    with Running(tmp, source, tmp + '/far', *fault_other_user(tmp, shell)) as running:
        assert not difference(source, replica)
        write(source + '/ro/two/three', 'changed', 0o400)
        write(source + '/ro/two/five', 'new')
        os.remove(source + '/ro/one')
        write(source + '/locked', 'still nobody')
        os.rename(source + '/ro/two/four', source + '/four')
        until_equal(source, replica, running=running)
        shutil.rmtree(source + '/ro')
        until_equal(source, replica, running=running)
        assert 'ermission' not in running.err()


@fault_in_each_shell
def test_a_destination_that_cannot_be_made_or_written_ends_with_the_reason(fault_open, shell):
    tmp, source = fault_open, fault_open + '/src'
    write(source + '/file', 'data')
    os.makedirs(tmp + '/closed')
    os.makedirs(tmp + '/theirs/src')
    write(tmp + '/filled/src/other', 'not ours')
    write(tmp + '/plain', 'a file')
    os.makedirs(tmp + '/shut', 0o700)
    before = tree_of(tmp + '/filled')
    for far, words in (('closed', 'cannot make the directory.*ermission denied'), ('theirs', 'ermission denied'),
                       ('filled', 'ermission denied'), ('plain', 'cannot make the directory.*Not a directory'),
                       ('shut', 'ermission denied')):
        for more in ([], ['--no-replicate-on-change']):
            done = once(*more, source, tmp + '/' + far, *fault_other_user(tmp, shell), expect=1)
            assert re.search(words, done.stderr) and tmp + '/' + far in done.stderr, (far, done.stderr)
    assert tree_of(tmp + '/filled') == before


def test_a_file_system_that_becomes_read_only_is_named_and_made_good_when_it_is_writable_again(fault_open):
    tmp, source = fault_open, fault_open + '/src'
    for name in ('file', 'gone/a/b/c', 'gone/d', 'from/a/b', 'from/c'):
        write(os.path.join(source, name), 'data')
    with fault_tmpfs(tmp + '/far', 'size=4m'):
        with Running(tmp, source, tmp + '/far', 'bash') as running:
            subprocess.run(['mount', '-o', 'remount,ro', tmp + '/far'], check=True)
            write(source + '/file', 'changed')
            os.makedirs(source + '/made/deep')
            shutil.rmtree(source + '/gone')
            os.rename(source + '/from', source + '/to')
            until(lambda: re.search('Read-only file system', running.err()), 20, running.log)
            assert running.process.poll() is None
            subprocess.run(['mount', '-o', 'remount,rw', tmp + '/far'], check=True)
            until_equal(source, tmp + '/far/src', FAULT_ROOM_SECONDS, running=running)
        subprocess.run(['mount', '-o', 'remount,ro', tmp + '/far'], check=True)
        once('--no-replicate-on-change', source, tmp + '/far', 'bash')        # nothing to do: nothing to write
        write(source + '/file', 'changed again')
        done = once('--no-replicate-on-change', source, tmp + '/far', 'bash', expect=1)
        assert 'Read-only file system' in done.stderr


def test_a_path_too_long_for_the_far_side_is_named_and_the_rest_arrives(tmp_path):
    """Over there a path begins with the staging or the replica's name: what just fits here may not fit there."""
    source, far = str(tmp_path / 's'), str(tmp_path / 'far')
    os.mkdir(source)
    os.mkdir(far)
    write(source + '/fine', 'data')
    start = os.open('.', os.O_RDONLY)
    top = os.open(source, os.O_RDONLY)
    lengths = []
    try:
        # One chain of directories; in it files whose whole path is as long as the kernel takes, and a bit less.
        os.fchdir(top)
        path = source
        while len(path) + 202 < 4096 - 300:
            os.mkdir('d' * 200)
            os.chdir('d' * 200)
            path += '/' + 'd' * 200
        for whole in (4095, 4094, 4070, 4050, 4030, 4000):
            name = 'f' * min(255, whole - len(path) - 1)
            if len(path) + 1 + len(name) != whole:
                os.makedirs('e' * (whole - len(path) - 2 - 200), exist_ok=True)
                name = 'e' * (whole - len(path) - 2 - 200) + '/' + 'f' * 200
            with open(name, 'w') as file:
                file.write(str(whole))
            lengths.append((whole, path[len(source) + 1:] + '/' + name))
        os.fchdir(start)
        done = once('--no-replicate-on-change', source, far, 'bash', expect=None)
        assert open(far + '/s/fine').read() == 'data'
        for whole, relative in lengths:
            arrived = False
            with contextlib.suppress(OSError):
                os.chdir(far)
                arrived = os.path.exists('s/' + relative)
            assert arrived or re.search('file_replicator: %s.*too long' % relative, done.stderr), (whole, done.stderr[-600:])
            assert done.returncode == 0 or not all(arrived for _ in lengths)
        assert ('in step' in done.stdout) == (done.returncode == 0)
    finally:
        os.fchdir(start)
        os.close(top)
        os.close(start)
        subprocess.run(['rm', '-rf', source, far])


@fault_in_each_shell
def test_a_file_that_is_a_mount_point_is_written_in_place(fault_open, shell):
    tmp, source, replica = fault_open, fault_open + '/src', fault_open + '/far/src'
    write(tmp + '/outer', 'as it was mounted')
    write(source + '/config', 'first')
    write(replica + '/config', '')
    strict = {'SHELLOPTS': 'errexit:noclobber'}         # bash heeds it: what fails ends it, and what is there is not written
    with fault_mount(replica + '/config', '--bind', tmp + '/outer'):
        with Running(tmp, source, tmp + '/far', *shell_command(tmp, shell), env=strict) as running:
            until_equal(source, replica, running=running)
            for data in (b'second, longer than the first', b'3', FAULT_BIG, b'small again'):
                write(source + '/config', data)
                until(lambda: open(replica + '/config', 'rb').read() == data, 20, running.log)
            until_equal(source, replica, running=running)
            assert open(tmp + '/outer').read() == 'small again'
            os.remove(source + '/config')
            until(lambda: re.search('file_replicator: config: .*[Bb]usy', running.err()), 20, running.log)
            assert 'lost' not in running.err()


@pytest.mark.parametrize('shell', ['bash', 'dash'])
def test_a_device_that_is_mounted_where_a_file_should_be_is_not_written_to(fault_open, shell):
    """As /dev/null is to hide a file from a container: what is written to it has not arrived."""
    tmp, source, replica = fault_open, fault_open + '/src', fault_open + '/far/src'
    write(source + '/hidden', 'secret')
    write(replica + '/hidden', '')
    with fault_mount(replica + '/hidden', '--bind', '/dev/null'):
        done = once('--no-replicate-on-change', source, tmp + '/far', *shell_command(tmp, shell), expect=1)
        assert re.search('file_replicator: hidden: .*[Bb]usy', done.stderr) and 'sent' not in done.stdout


@fault_in_each_shell
def test_a_directory_that_cannot_be_renamed_there_arrives_under_its_new_name(fault_open, shell):
    tmp, source, replica = fault_open, fault_open + '/src', fault_open + '/far/src'
    for name in ('old/a/b', 'old/c'):
        write(os.path.join(source, name), name)
    os.makedirs(replica + '/old')
    with fault_tmpfs(replica + '/old', 'size=1m'):
        with Running(tmp, source, tmp + '/far', *shell_command(tmp, shell)) as running:
            os.rename(source + '/old', source + '/new')
            until(lambda: os.path.isdir(replica + '/new') and not difference(source + '/new', replica + '/new'), 20, running.log)


def test_a_running_executable_is_replaced_and_runs_on(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    binary = open(need('sleep'), 'rb').read()
    for name, data in (('small', binary), ('large', binary + bytes(3 << 20))):
        write(os.path.join(source, name), data, 0o755)
    os.mkdir(far)
    with Running(tmp_path, source, far, 'bash') as running:
        sleeping = [subprocess.Popen([os.path.join(far, 'src', name), '60']) for name in ('small', 'large')]
        try:
            for name in ('small', 'large'):
                with open(os.path.join(source, name), 'ab') as file:
                    file.write(b'more')
            until_equal(source, far + '/src', running=running)
            assert all(process.poll() is None for process in sleeping)
            assert 'busy' not in running.err()
        finally:
            for process in sleeping:
                process.kill()
                process.wait()


@pytest.mark.parametrize('shell', ['bash', 'dash'])
@pytest.mark.parametrize('tool', ['touch', 'chmod', 'ln'])
def test_a_far_side_that_refuses_a_tool_says_so_and_the_bytes_arrive(tmp_path, shell, tool):
    """As on vfat, where there are no modes, no links, and times only when it suits."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    replica = far + '/src'
    connect = shell_command(tmp_path, shell)
    fault_command(tmp_path / ('shims-' + shell), tool, '#!/bin/sh\necho "%s: Operation not supported" >&2\nexit 1\n' % tool)
    write(source + '/first', 'first', 0o644, 10**18)
    os.mkdir(far)
    with Running(tmp_path, source, far, *connect, wait=False) as running:
        until(lambda: os.path.exists(replica + '/first'), 20, running.log)
        if tool == 'ln':            # by itself: tar makes links without it
            os.symlink('first', source + '/link')
            until(lambda: re.search('file_replicator: link: .*Operation not supported', running.err()), 20, running.log)
        made = str(tmp_path / 'made')           # moved in as it shall be: no mode has to be changed later
        write(made + '/run', 'script', 0o750, 10**18)
        write(made + '/secret', 'secret', 0o600)
        write(made + '/big', FAULT_BIG, 0o600)
        os.makedirs(made + '/d/e')
        for i in range(20):
            write(made + '/bulk/%d' % i, str(i), 0o640)
        for name in os.listdir(made):
            os.rename(os.path.join(made, name), os.path.join(source, name))
        names = ['first', 'run', 'secret', 'big', 'bulk/19', 'd/e']
        until(lambda: os.path.exists(replica + '/bulk/19'), 20, running.log)
        for name in ('alone', 'alone2/file'):           # not with many others
            write(os.path.join(made, name), 'secret', 0o700)
        os.chmod(made + '/alone2', 0o700)
        for name in ('alone', 'alone2'):
            os.rename(os.path.join(made, name), os.path.join(source, name))
            until(lambda: os.path.exists(os.path.join(replica, name)), 20, running.log)
        names += ['alone2/file']
        until(lambda: fault_holds(replica, 'big', FAULT_BIG), 20, running.log)
        with open(source + '/big', 'r+b') as file:
            file.write(b'patched')
        until(lambda: all(os.path.lexists(os.path.join(replica, name)) for name in names), 20, running.log)
        until(lambda: re.search('file_replicator: .*Operation not supported', running.err()), 20, running.log)
        for path, (kind, mode, mtime, data) in tree_of(source).items():
            if path != '.' and kind != stat.S_IFLNK:
                until(lambda: tree_of(replica)[path][3] == data and not tree_of(replica)[path][1] & ~mode, 20,
                      lambda: '%s: %s' % (path, running.log()))
        if tool != 'ln':            # its bytes are not sent for that again
            until(lambda: 'file_replicator: alone: its mode or time could not be set: ' in running.err(), 20, running.log)
            assert running.out().count('sent alone (') == 1, running.log()
        if tool == 'ln':            # not removed: a shell remembers where it found it
            fault_command(tmp_path / ('shims-' + shell), tool, '#!/bin/sh\nexec %s "$@"\n' % need('ln'))
            until_equal(source, replica, FAULT_ROOM_SECONDS, running=running)


@pytest.mark.parametrize('tool', ['chmod', 'touch'])
def test_a_mode_or_time_that_could_not_be_set_is_set_once_it_can_be(tmp_path, tool):
    source, far, bad = str(tmp_path / 'src'), str(tmp_path / 'far'), str(tmp_path / 'bad')
    connect = shell_command(tmp_path, 'dash')
    fault_command(tmp_path / 'shims-dash', tool, '#!/bin/sh\nif [ -e %s ]; then echo "not now" >&2; exit 1; fi\nexec %s "$@"\n'
                  % (bad, need(tool)))
    for name in ('d/changed', 'd/replaced'):
        write(os.path.join(source, name), 'first', 0o644, 10**18)
    os.mkdir(far)
    with Running(tmp_path, source, far, *connect) as running:
        until_equal(source, far + '/src', running=running)
        write(bad)
        write(str(tmp_path / 'new'), 'new', 0o4755, 10**18)
        os.rename(str(tmp_path / 'new'), source + '/d/replaced')
        os.chmod(source + '/d/changed', 0o751)
        os.utime(source + '/d/changed', ns=(10**18, 2 * 10**18))
        until(lambda: all('d/%s: its mode or time could not be set: not now' % name in running.err()
                          for name in ('changed', 'replaced')), 20, running.log)
        os.remove(bad)
        until_equal(source, far + '/src', FAULT_ROOM_SECONDS, running=running)
        assert running.out().count('sent d/') == 3, running.log()       # their bytes were there


@pytest.mark.parametrize('shell', ['bash', 'dash', 'mksh'])
@pytest.mark.parametrize('many', [False, True], ids=['one file', 'many'])
def test_what_a_failed_record_left_does_not_come_among_what_is_sent_next(tmp_path, shell, many):
    """Neither mv nor rm can be started for a while: nothing gets to its place, and nothing is cleared up."""
    source, far, bad = str(tmp_path / 'src'), str(tmp_path / 'far'), str(tmp_path / 'bad')
    connect = shell_command(tmp_path, shell)
    for tool in ('mv', 'rm'):
        fault_command(tmp_path / ('shims-' + shell), tool, '#!/bin/sh\nif [ -e %s ]; then echo "no memory" >&2; exit 1; fi\n'
                      'exec %s "$@"\n' % (bad, need(tool)))
    os.makedirs(source + '/d/e')
    os.mkdir(far)
    with Running(tmp_path, source, far, *connect) as running:
        until_equal(source, far + '/src', running=running)
        write(bad)
        for name, above in (('first', '/d/'), ('second', '/d/e/' if many else '/d/')):
            for number in range(20 if many else 1):
                write(str(tmp_path) + '/made/%s/%d' % (name, number), name)
            whole, part = str(tmp_path) + '/made/' + name, '' if many else '/0'
            os.rename(whole + part, source + above + name)
            until(lambda: 'no memory' in running.err(), 20, running.log)
            if os.path.exists(bad):
                os.remove(bad)
        # What a session could not remove at its end goes when the next one needs a staging.
        until(lambda: running.out().endswith('in step\n') and len(fault_staging(far + '/src')) < 2, FAULT_ROOM_SECONDS, running.log)
        write(source + '/large', bytes(2 << 20))
        until_equal(source, far + '/src', FAULT_ROOM_SECONDS, running=running)


@pytest.mark.parametrize('tar', [True, False], ids=['tar', 'no tar'])
def test_directories_inherit_no_setgid_over_there(tmp_path, tar):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for number in range(5):
        write('%s/d/%d/f' % (source, number))
    for mode in ('700', '500', '1777', '711'):
        write('%s/%s/f' % (source, mode))
        os.chmod('%s/%s' % (source, mode), int(mode, 8))
    os.mkdir(far)
    os.chmod(far, 0o2775)
    connect = shell_command(tmp_path, 'dash')
    with Running(tmp_path, source, far, *(connect if tar else without_tar(tmp_path, connect))) as running:
        until_equal(source, far + '/src', running=running)
        os.mkdir(source + '/alone')
        until_equal(source, far + '/src', running=running)


@fault_in_each_shell
def test_what_is_half_way_there_is_nobody_elses_to_read(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/large', FAULT_BIG[:2000000])
    os.mkdir(far)
    connect, controls = fault_relay(tmp_path, *shell_command(tmp_path, shell), slow=0.01)
    with Running(tmp_path, source, far, *connect, wait=False) as running:
        staged, = until(lambda: fault_staging(far), 20, running.log)
        assert stat.S_IMODE(os.stat(staged).st_mode) == 0o700
        until_equal(source, far + '/src', running=running)


@pytest.mark.parametrize('shell', ['bash', 'dash'])
@pytest.mark.parametrize('staged', [b'part 2 0 = p\n6 m\nsecretm\n', b'base 2 1 p 1 6 0\n./plain\n0\n'],
                         ids=['part', 'base'])
def test_what_was_staged_is_nobody_elses_to_read_even_if_its_mode_cannot_be_set(tmp_path, shell, staged):
    far = str(tmp_path / 'far')
    text = session_text(far)
    connect = shell_command(tmp_path, shell)
    fault_command(tmp_path / ('shims-' + shell), 'chmod', '#!/bin/sh\nexit 1\n')
    records = b'file 1 1 022 - 1 -\n./plain\n6 m\nsecretm\n' + staged + b'file 3 1 077 00600 1 p\n./secret\n0\n'
    subprocess.run([*connect, '-c', text], input=records, stdout=subprocess.DEVNULL, timeout=20)
    assert stat.S_IMODE(os.stat(far + '/plain').st_mode) == 0o644 and fault_holds(far, 'secret', b'secret')
    assert stat.S_IMODE(os.stat(far + '/secret').st_mode) == 0o600


@pytest.mark.parametrize('shell', ['bash', 'dash'])
def test_a_large_file_whose_staged_part_is_removed_over_there_is_sent_again(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/first')
    os.mkdir(far)
    connect, _ = fault_relay(tmp_path, *shell_command(tmp_path, shell), slow=0.003)
    with Running(tmp_path, source, far, *connect) as running:
        write(source + '/large', FAULT_BIG * 2)
        part, = until(lambda: [part for part in glob.glob(far + '/src/.file_replicator.*/part*')
                               if os.path.getsize(part) > 2 << 20], 20, running.log)
        os.unlink(part)
        running.says('large: what was staged of it is gone')
        until_equal(source, far + '/src', 60, running=running)


@pytest.mark.parametrize('shell', ['bash', 'dash'])
def test_a_name_is_never_taken_for_the_reason_of_a_failure(tmp_path, shell):
    source, far, failing = (str(tmp_path / name) for name in ('src', 'far', 'failing'))
    words = shell_command(tmp_path, shell)
    for tool in ('mv', 'rm', 'rmdir'):
        fault_command(tmp_path / ('shims-' + shell), tool,
                      '#!/bin/sh\ncase "$*" in *./busybox* | *"not empty"*) if [ -e {0} ]; then\n'
                      'echo "{1}: cannot change \'$*\': Read-only file system" >&2; exit 1; fi ;; esac\n'
                      'exec {2} "$@"\n'.format(failing, tool, need(tool)))
    for name in ('busybox/f', 'not empty', 'stays'):
        write(source + '/' + name, 'first')
    os.mkdir(source + '/busybox2')
    with Running(tmp_path, source, far, *words) as running:
        write(failing)
        os.rmdir(source + '/busybox2')
        running.says('busybox2: ')
        os.unlink(source + '/not empty')
        running.says('not empty: ')
        write(source + '/busybox/f', 'changed')
        running.says('busybox/f: ')
        assert fault_holds(far + '/src', 'busybox/f', b'first')
        assert 'stays over there' not in running.err() and 'was changed over there' not in running.err()
        os.unlink(failing)
        until_equal(source, far + '/src', running=running)


@pytest.mark.parametrize('shell', ['bash', 'dash'])
def test_a_tool_that_outlives_its_killed_session_changes_nothing_after_the_next_one_looked(sshd, tmp_path, shell):
    """A mv waits until the next session has listed the replica, and would then rename behind its back. Over ssh, where
    nothing ends what runs there when the connection is lost."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    words = shell_command(tmp_path, shell)
    shims, moving, listed, moved = (str(tmp_path / name) for name in ('shims-' + shell, 'moving', 'listed', 'moved'))
    write(source + '/a/file', 'file')
    os.mkdir(far)
    fault_command(shims, 'mv', '#!/bin/sh\n[ "$2 $3" = "./a ./b" ] && [ ! -e {0} ] || exec {3} "$@"\ntouch {0}\n'
                  'until [ -e {1} ]; do sleep 0.02; done\n{3} "$@"\ntouch {2}\n'.format(moving, listed, moved, need('mv')))
    fault_command(shims, 'find', '#!/bin/sh\n{2} "$@"\n[ ! -e {0} ] || {{ touch {1}; sleep 0.5; }}\n'.format(
        moving, listed, need('find')))
    with Running(tmp_path, source, far, *sshd, *words) as running:
        os.rename(source + '/a', source + '/b')
        until(lambda: os.path.exists(moving), 20, running.log)
        os.rename(source + '/b', source + '/c')
        running.cut()
        running.says('connected again')
        until_equal(source, far + '/src', running=running)
        assert not os.path.exists(moved)


@pytest.mark.parametrize('shell', ['bash', 'dash'])
def test_what_cannot_be_renamed_there_is_sent_and_what_failed_is_sent_to_where_it_was_renamed_meanwhile(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    words = shell_command(tmp_path, shell)
    shims, failing, renamed = (str(tmp_path / name) for name in ('shims-' + shell, 'failing', 'renamed'))
    for name in ('file', 's/deep', 's/t/deeper'):
        write(source + '/a/' + name, name)
    os.mkdir(far)
    fault_command(shims, 'mv', '#!/bin/sh\ncase "$2 $3" in\n"./a ./b") exit 1 ;;\n'
                  '*"-new ./b/file") ! grep -q changed "$2" || {{\n'
                  '  touch {0}; until [ -e {1} ]; do sleep 0.02; done; sleep 0.2; exit 1; }} ;;\n'
                  'esac\nexec {2} "$@"\n'.format(failing, renamed, need('mv')))
    with Running(tmp_path, source, far, *words) as running:
        os.rename(source + '/a', source + '/b')
        until_equal(source, far + '/src', running=running)
        write(source + '/b/file', 'changed')
        until(lambda: os.path.exists(failing), 20, running.log)
        os.rename(source + '/b', source + '/c')
        write(renamed)
        until_equal(source, far + '/src', running=running)


@pytest.mark.parametrize('old, new, comes', [('d/big', 'd/large', ''), ('d', 'e', ''), ('d', 'e', 'd/big')])
def test_a_large_file_that_is_renamed_on_its_way_arrives_though_size_and_time_are_as_before(tmp_path, old, new, comes):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/d/big', FAULT_BIG[:3 << 20], mtime_ns=10**18)
    os.mkdir(far)
    connect, _ = fault_relay(tmp_path, 'bash', slow=0.003)
    with Running(tmp_path, source, far, *connect) as running:
        running.process.send_signal(signal.SIGSTOP)
        write(source + '/d/big', FAULT_BIG[:3 << 20][::-1], mtime_ns=10**18)
        running.process.send_signal(signal.SIGCONT)
        until(lambda: [part for part in glob.glob(far + '/src/.file_replicator.*/part*')
                       if os.path.getsize(part) > 1 << 20], 20, running.log)
        running.process.send_signal(signal.SIGSTOP)
        os.rename(source + '/' + old, source + '/' + new)
        if comes:
            write(source + '/' + comes, 'another')
        running.process.send_signal(signal.SIGCONT)
        until_equal(source, far + '/src', running=running)


@pytest.mark.parametrize('shell', ['bash', 'dash'])
def test_what_is_in_a_directory_that_failed_arrives_though_the_directory_is_touched_while_it_is_tried_again(tmp_path, shell):
    source, far, full, tried = (str(tmp_path / name) for name in ('src', 'far', 'full', 'tried'))
    words = shell_command(tmp_path, shell)
    fault_command(tmp_path / ('shims-' + shell), 'mkdir', (
        '#!/bin/sh\ncase "$*" in *./new)\n  if [ -e {0} ]; then\n    until [ -e {0}/new ]; do sleep 0.02; done\n'
        '    echo "mkdir: cannot create: No space left on device" >&2; exit 1\n  fi\n'
        '  touch {1}; until [ -e {1}.touched ]; do sleep 0.02; done ;;\nesac\nexec {2} "$@"\n').format(full, tried, need('mkdir')))
    os.mkdir(source)
    os.mkdir(full)
    with Running(tmp_path, '--debugging', source, far, *words) as running:
        os.mkdir(source + '/new')
        running.says('record dir')
        write(source + '/new/f', 'f')
        until(lambda: re.search(r'record file .*\n?.*new/f', running.err()), 20, running.log)
        write(full + '/new')            # the directory fails only now, and so does the file
        running.says('No space left')
        shutil.rmtree(full)
        until(lambda: os.path.exists(tried), 20, running.log)
        events = running.err().count('event new ')
        os.chmod(source + '/new', 0o755)
        until(lambda: running.err().count('event new ') > events, 20, running.log)
        write(source + '/later')
        running.says('event later')     # by then it was looked at
        write(tried + '.touched')
        until_equal(source, far + '/src', running=running)


@pytest.mark.parametrize('shell', ['bash', 'dash'])
def test_a_tool_for_sums_that_ends_without_a_word_holds_nothing_up(tmp_path, shell):
    source, far, broken = (str(tmp_path / name) for name in ('src', 'far', 'broken'))
    words = shell_command(tmp_path, shell)
    for tool in ('sha256sum', 'sha1sum', 'md5sum'):
        fault_command(tmp_path / ('shims-' + shell), tool, '#!/bin/sh\n[ ! -e %s ] || exit 1\nexec %s "$@"\n' % (broken, need(tool)))
    write(source + '/large', FAULT_BIG[:3 << 20])
    with Running(tmp_path, source, far, *words) as running:
        write(broken)
        write(source + '/large', FAULT_BIG[:2 << 20] + b'x')
        until_equal(source, far + '/src', 10, running=running)


def test_a_large_file_that_becomes_a_directory_while_it_is_on_its_way_is_not_in_its_way(tmp_path):
    """What stands over there is not known then, so it must not be taken for nothing."""
    source, far, made = (str(tmp_path / name) for name in ('src', 'far', 'made'))
    write(source + '/big', FAULT_BIG[:2 << 20])
    os.mkdir(far)
    for i in range(5):
        write(made + '/sub/%d' % i, 'in a record with others')
    connect, _ = fault_relay(tmp_path, 'bash', slow=0.003)
    with Running(tmp_path, '--debugging', source, far, *connect) as running:
        write(source + '/big', FAULT_BIG[::-1])
        until(lambda: [part for part in glob.glob(far + '/src/.file_replicator.*/part*')
                       if os.path.getsize(part) > 3 << 20], 20, running.log)
        running.process.send_signal(signal.SIGSTOP)     # so that both are seen at once
        os.unlink(source + '/big')
        os.rename(made, source + '/big')
        running.process.send_signal(signal.SIGCONT)
        until_equal(source, far + '/src', running=running)
        assert not re.findall(r'answer \d+ [12].*', running.err())


def test_a_far_side_that_is_never_as_it_listed_is_given_up_and_the_path_named(tmp_path, monkeypatch):
    """A mkdir that says it made what it did not: each new connection would find the same."""
    fault_other_number(monkeypatch, tmp_path, 'DRIFTS_MOST = 9 ', 'DRIFTS_MOST = 5 ')
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/d/file', 'data')
    os.mkdir(far)
    connect = shell_command(tmp_path, 'dash')
    fault_command(tmp_path / 'shims-dash', 'mkdir', '#!/bin/sh\n[ "$3" = ./d ] || exec %s "$@"\n' % need('mkdir'))
    done = once('--no-replicate-on-change', source, far, *connect, expect=1)
    assert 'd/file: ' in done.stderr and done.stderr.count('changed over there') == 5


def test_it_compares_again_as_often_as_they_change_the_replica_if_it_was_in_step_in_between(tmp_path, monkeypatch):
    fault_other_number(monkeypatch, tmp_path, 'DRIFTS_MOST = 9 ', 'DRIFTS_MOST = 1 ')
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/d/file', 'data')
    os.mkdir(far)
    with Running(tmp_path, source, far, 'dash') as running:
        for number in range(3):
            shutil.rmtree(far + '/src/d')
            write(source + '/d/file', '%d' % number)
            running.in_step(number + 2, within=20)
            assert not difference(source, far + '/src')


# ---- what stands in the way there

def fault_obstacles(source, replica, victim):
    """Files, directories and links here, and over there in their places what is another thing."""
    for i in range(5):
        write('%s/dir-is-link/many/%d' % (source, i), 'new')
        write('%s/dir-is-file/%d' % (source, i), 'new')
    write(source + '/dir-is-link/file', 'new', 0o600, 10**18)
    write(source + '/below/dir-is-link/deep', 'new')
    write(source + '/big-is-link', FAULT_BIG)
    write(source + '/dir-dangles/in', 'new')
    for name in ('file-is-empty-dir', 'file-is-link', 'file-dangles', 'file-is-link-to-dir', 'read-only', 'file-is-fifo'):
        write(os.path.join(source, name), 'new ' + name, 0o640, 10**18)
    for name in ('link-is-file', 'link-is-link-to-dir', 'link-is-empty-dir'):
        os.symlink('nowhere', os.path.join(source, name))
    os.makedirs(replica + '/below')
    for name, target in (('dir-is-link', victim), ('below/dir-is-link', victim + '/inside'), ('dir-dangles', victim + '/new'),
                         ('big-is-link', victim + '/file'), ('file-is-link', victim + '/file'),
                         ('file-dangles', victim + '/new'), ('file-is-link-to-dir', victim), ('link-is-link-to-dir', victim),
                         ('.file_replicator.aaaaaaaaaaaa', victim), ('.file_replicator.bbbbbbbbbbbb-new', victim + '/file')):
        os.symlink(target, os.path.join(replica, name))
    for name in ('dir-is-file', 'link-is-file'):
        write(os.path.join(replica, name), 'old')
    os.mkdir(replica + '/file-is-empty-dir')
    os.mkdir(replica + '/link-is-empty-dir')
    os.mkfifo(replica + '/file-is-fifo')
    write(replica + '/read-only', 'old', 0o444)
    os.makedirs(replica + '/.file_replicator.0123456789ab/b/1')         # of a run that was killed
    os.symlink(victim, replica + '/.file_replicator.0123456789ab/b/1/way-out')
    write(replica + '/.file_replicator.0123456789ab/part1', 'half')
    write(replica + '/below/.file_replicator.0123456789ab-new', 'half')


@fault_in_each_shell
@pytest.mark.parametrize('mirror', [[], ['--mirror']], ids=['', 'mirror'])
def test_what_is_in_the_way_is_replaced_and_never_followed(tmp_path, shell, mirror):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    replica = far + '/src'
    victim, before = fault_victim(tmp_path)
    fault_obstacles(source, replica, victim)
    once(*mirror, '--no-replicate-on-change', source, far, *shell_command(tmp_path, shell))
    assert tree_of(victim) == before
    dangling = '.file_replicator.aaaaaaaaaaaa'      # a link is not a staging we could have made
    assert [line for line in difference(source, replica, True) if dangling not in line] == []


@fault_in_each_shell
def test_a_directory_that_holds_theirs_is_never_replaced_by_a_file(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'new')
    write(source + '/link-target', 'x')
    os.symlink('link-target', source + '/link')
    write(source + '/other', 'arrives')
    write(far + '/src/file/theirs', 'theirs')
    write(far + '/src/link/theirs', 'theirs')
    done = once('--no-replicate-on-change', source, far, *shell_command(tmp_path, shell), expect=1)
    for name in ('file', 'link'):
        assert open(far + '/src/%s/theirs' % name).read() == 'theirs'
        assert re.search('file_replicator: %s: .*([Nn]ot empty|not replicated)' % name, done.stderr), done.stderr
    assert open(far + '/src/other').read() == 'arrives' and not fault_staging(far)


@pytest.mark.parametrize('other', ['echo theirs >d', 'ln -s . d'])
def test_what_they_put_in_the_place_of_a_directory_goes_when_that_goes_here(tmp_path, other):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.makedirs(source + '/d')
    with Running(tmp_path, source, far, 'dash') as running:
        subprocess.run(['sh', '-c', 'rmdir d; ' + other], cwd=far + '/src', check=True)
        os.rmdir(source + '/d')
        until(lambda: not os.path.lexists(far + '/src/d'), 5, running.log)


@fault_in_each_shell
def test_what_is_gone_over_there_already_is_no_trouble_when_it_goes_here(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for name in ('file', 'other', 'd/e/in'):
        write(os.path.join(source, name), 'data')
    os.mkdir(far)
    with Running(tmp_path, source, far, *shell_command(tmp_path, shell)) as running:
        for root, elsewhere in ((far + '/src', 'theirs'), (source, 'ours')):
            os.mkdir(str(tmp_path / elsewhere))
            for name in ('d', 'file'):              # with all that is in it at once: else its time is set in between
                os.rename(os.path.join(root, name), str(tmp_path / elsewhere / name))
        until(lambda: running.out().count('removed') == 4, 20, running.log)
        assert running.err() == ''


@fault_in_each_shell
def test_what_somebody_puts_in_the_way_while_we_watch_is_never_followed(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    victim, before = fault_victim(tmp_path)
    os.mkdir(far)
    changes = {
        'a file below': lambda d: write(d + '/file', 'changed'),
        'many files below': lambda d: [write(d + '/m%d' % i, 'new') for i in range(9)],
        'a large file below': lambda d: write(d + '/big', FAULT_BIG),
        'a patch below': lambda d: write(d + '/large', FAULT_BIG[:1999995] + b'patch'),
        'a removal below': lambda d: os.remove(d + '/file'),
        'a directory removed below': lambda d: shutil.rmtree(d + '/inside'),
        'an empty directory removed below': lambda d: os.rmdir(d + '/empty'),
        'all removed': shutil.rmtree,
        'a mode below': lambda d: os.chmod(d + '/file', 0o777),
        'a rename below': lambda d: os.rename(d + '/inside', d + '/outside'),
        'a rename to below': lambda d: os.rename(d + '-other', d + '/other'),
        'a rename from below': lambda d: os.rename(d + '/inside', d + '-inside'),
        'a rename of it': lambda d: os.rename(d, d + '2'),
        'a directory below': lambda d: os.makedirs(d + '/x/y'),
        'a link below': lambda d: os.symlink('file', d + '/another'),
        'a mode of it': lambda d: os.chmod(d, 0o700),
        'a rename to it': lambda d: (link(d + '2'), os.rename(d, d + '2')),
        'a file in its place': lambda d: (link(d + '2'), write(d + '2', 'new')),
        'a link in its place': lambda d: (link(d + '2'), os.symlink('d', d + '2')),
        'a directory in its place': lambda d: (link(d + '2'), os.mkdir(d + '2')),
    }

    def link(path):
        os.symlink(victim, path.replace(source, far))

    with contextlib.ExitStack() as stack:       # one for each: it looks at everything again after the first that it meets
        runs = []
        for number, change in enumerate(changes.values()):
            here, there = os.path.join(source, str(number)), os.path.join(far, str(number))
            for name in ('file', 'link', 'inside/deep'):
                write(os.path.join(here, 'd', name), 'ours')
            write(here + '/d/large', FAULT_BIG[:2000000])
            write(here + '/d-other', 'ours')
            os.mkdir(here + '/d/empty')
            runs.append((change, here, there, stack.enter_context(
                Running(tmp_path, here, far, *shell_command(tmp_path, shell), wait=False))))
        for change, here, there, running in runs:
            running.in_step()
            write(here + '/d/inside/deep', 'the last record before was one below it')
        for change, here, there, running in runs:
            until_equal(here, there, 20, running=running)
            running.in_step(2)
            shutil.rmtree(there + '/d')
            os.symlink(victim, there + '/d')
        for change, here, there, running in runs:
            change(here + '/d')
        for change, here, there, running in runs:
            until(lambda: running.out().count('in step') > 2 or 'over there' in running.err(), 20, running.log)
            if os.path.isdir(here + '/d2') and not os.listdir(here + '/d2'):
                assert os.path.isdir(there + '/d2') and not os.path.islink(there + '/d2')
            for directory in next(os.walk(here))[1]:    # what goes, or only its own time changes, meets nothing
                write(os.path.join(here, directory, 'last'), 'last')
            until_equal(here, there, 30, running=running)
        assert tree_of(victim) == before


@fault_in_each_shell
def test_a_replica_that_is_itself_a_link_is_not_followed(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    victim, before = fault_victim(tmp_path)
    write(source + '/file', 'ours')
    os.mkdir(far)
    os.symlink(victim, far + '/src')
    once('--mirror', '--dry-run', source, far, *shell_command(tmp_path, shell))
    assert os.path.islink(far + '/src')
    once('--mirror', '--no-replicate-on-change', source, far, *shell_command(tmp_path, shell))
    assert tree_of(victim) == before and not difference(source, far + '/src')


def test_a_hostile_source_writes_nothing_outside_the_replica(tmp_path):
    """Its links lead out, then become directories, and the other way round, again and again."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    victim, before = fault_victim(tmp_path)
    os.mkdir(far)
    os.mkdir(source)
    dice = random.Random(5)
    with Running(tmp_path, source, far, 'dash') as running:
        for _ in range(120):
            path = '%s/%d' % (source, dice.randrange(4))
            if os.path.islink(path):
                os.remove(path)
            elif os.path.isdir(path):
                shutil.rmtree(path)
            if dice.random() < 0.5:
                os.symlink(dice.choice([victim, '../../victim', '../..', '/']), path)
            else:
                for name in ('file', 'inside/deep'):
                    write(os.path.join(path, name), 'ours')
            time.sleep(dice.random() * 0.02)
        until_equal(source, far + '/src', running=running)
    assert tree_of(victim) == before
    assert sorted(os.listdir(far)) == ['src']


# ---- the connection

def fault_all_records(source, replica=None):
    """A source, and a replica in an older state, between which records of every kind but a move are needed."""
    for i in range(40):
        write('%s/many/%d/file' % (source, i % 4) + str(i), 'bytes of %d\n' % i * i)
    write(source + '/big', FAULT_BIG[:1500000])
    write(source + '/patched', FAULT_BIG[:2000000])
    write(source + '/secret', 'secret', 0o600)
    os.symlink('big', source + '/link')
    os.makedirs(source + '/empty')
    write(source + '/mode', 'same', 0o755, 10**18)
    write(source + '/kind/file', 'a directory now')
    if replica:
        write(replica + '/patched', FAULT_BIG[:999999] + b'.' + FAULT_BIG[1000000:1900000], None, 10**18)
        write(replica + '/mode', 'same', 0o644, 10**18)
        write(replica + '/old/theirs', 'gone with --mirror')
        write(replica + '/old/deep/er', 'gone too')
        write(replica + '/kind', 'a file before')
        os.symlink('elsewhere', replica + '/link')


@fault_in_each_shell
def test_a_run_cut_after_every_nth_byte_is_repaired_even_if_the_repair_is_cut_too(tmp_path, shell):
    """Each run is cut twice, at n bytes and in the repair, then left alone. Nothing is ever there in part."""
    count = 8
    source = str(tmp_path / 'src')
    fault_all_records(source)
    whole = {data for kind, mode, mtime, data in tree_of(source).values() if kind == stat.S_IFREG}
    connect = shell_command(tmp_path, shell)
    program = len(fr.RECEIVER) + 1500

    def cut(number, at):
        far = str(tmp_path / ('far%d' % number))
        fault_all_records(str(tmp_path / ('scratch%d' % number)), far + '/src')
        old = {data for kind, mode, mtime, data in tree_of(far).values() if kind == stat.S_IFREG}
        again = max(program, at // 2 + 5000)
        relay = fault_command(tmp_path, 'cut%d' % number, '\n'.join([
            '#!/bin/bash', 'read -r n <"$0.n"; echo $((n + 1)) >"$0.n"',
            'case $n in 0) bytes=%d ;; 1) bytes=%d ;; *) exec "$@" ;; esac' % (at, again),
            'dd bs=4096 count=$bytes iflag=count_bytes status=none | "$@"', 'find %s -name ".file_replicator.*" >>"$0.left"' % far,
            'find %s -type f -exec cat {} + | cksum >>"$0.seen"' % far]))
        write(relay + '.n', '0\n')
        done = once('--wait', '--mirror', '--remote-hook', 'cat >/dev/null', '--no-replicate-on-change', source, far,
                    relay, *connect)
        assert not difference(source, far + '/src'), (at, done.stderr)
        assert open(relay + '.n').read() != '0\n' and not open(relay + '.left').read(), at
        for kind, mode, mtime, data in tree_of(far).values():
            assert kind != stat.S_IFREG or data in whole | old
        shutil.rmtree(far)
        shutil.rmtree(str(tmp_path / ('scratch%d' % number)))

    total = program + 1500000 + 300000
    places = [500, program // 2, program - 800] + [program + (total - program) * i // count for i in range(count)]
    places += [program + i * 97 for i in range(6)]          # among the small records that come first
    fault_together(list(enumerate(places)), cut)


def test_a_watching_run_cut_at_any_byte_of_any_record_repairs_itself(tmp_path, monkeypatch):
    fault_other_number(monkeypatch, tmp_path, 'self.delay = min(5.0, ', 'self.delay = min(0.3, ')
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    replica = far + '/src'
    os.mkdir(far)
    fault_all_records(source)
    dice = random.Random(7)
    contents = {data for kind, *_, data in tree_of(source).values() if kind == stat.S_IFREG}
    relay, controls = fault_relay(tmp_path, 'dash')
    wrong, over = [], threading.Event()

    def put(name, data):
        contents.add(data)
        write(os.path.join(source, name), data)

    def reader():
        """What a reader over there may meet at any time: files that are whole."""
        while not over.is_set():
            for directory, directories, names in os.walk(replica):
                directories[:] = [name for name in directories if not fr.STAGING.fullmatch(name)]
                for name in names:
                    if not fr.STAGING.fullmatch(name):
                        with contextlib.suppress(OSError):
                            with open(os.path.join(directory, name), 'rb') as file:
                                data = file.read()
                            if data not in contents:
                                wrong.append((directory, name, len(data)))

    def flip(a, b):
        a, b = os.path.join(source, a), os.path.join(source, b)
        os.rename(*((a, b) if os.path.exists(a) else (b, a)))

    edits = [
        lambda n: put('file', b'version %d' % n),
        lambda n: [put('bulk/%d/%d' % (n, i), b'%d %d' % (n, i)) for i in range(12)],
        lambda n: put('big', FAULT_BIG[:1500000 + n]),
        lambda n: put('patched', FAULT_BIG[:n] + b'p%d' % n + FAULT_BIG[n + 4:2000000]),
        lambda n: flip('many', 'more'),
        lambda n: flip('big', 'huge'),
        lambda n: os.chmod(source + '/mode', 0o600 + n % 64),
        lambda n: [shutil.rmtree(source + '/bulk/' + name) for name in os.listdir(source + '/bulk')],
        lambda n: (os.remove(source + '/link'), os.symlink('to%d' % n, source + '/link')),
        lambda n: os.makedirs(source + '/dirs/%d/x' % n),
    ]
    sizes = [90, 4000, 1500000, 60000, 30, 30, 25, 60, 30, 30]
    os.makedirs(source + '/bulk')
    thread = threading.Thread(target=reader)
    thread.start()
    try:
        with Running(tmp_path, '--remote-hook', 'cat >/dev/null', source, far, *relay) as running:
            for number in range(20):
                kind = number % len(edits)
                write(controls + '/armed', str(dice.randrange(1, sizes[kind])))
                edits[kind](number)
                edits[dice.randrange(len(edits))](number + 1000)
                until(lambda: not os.path.exists(controls + '/armed') or not difference(source, replica), 30,
                      lambda: '%d %s %s' % (number, difference(source, replica), running.log()[-2000:]))
                if dice.random() < 0.3:         # and again, before the repair is through
                    write(controls + '/armed', str(len(fr.RECEIVER) + dice.randrange(300, 9000)))
            with contextlib.suppress(FileNotFoundError):
                os.remove(controls + '/armed')
            until_equal(source, replica, 30, running=running)
            assert 'connection lost' in running.err()
            steps = running.out().count('in step')
            put('last', b'last')
            until(lambda: running.out().count('in step') > steps and not fault_staging(replica))
    finally:
        over.set()
        thread.join()
    assert not wrong, wrong[:5]


def test_a_replica_taken_away_with_its_connection_is_made_anew(tmp_path):
    """A container that is made anew."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    fault_all_records(source)
    os.mkdir(far)
    with Running(tmp_path, source, far, 'bash') as running:
        for _ in range(3):
            running.cut()
            shutil.rmtree(far)
            os.mkdir(far)
            until_equal(source, far + '/src', running=running)
        shutil.rmtree(far + '/src')             # without an end of the connection: at the next change
        write(source + '/file', 'new')
        until_equal(source, far + '/src', running=running)


@fault_in_each_shell
def test_a_session_that_was_given_up_writes_nothing_more_once_another_began(tmp_path, shell):
    """Its connection may be silent here and its bytes still on their way there."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'new')
    connect = shell_command(tmp_path, shell)
    text = session_text(far + '/src')
    old = subprocess.Popen([*connect, '-c', text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    old.stdin.write(b'part 1 0 = p\n0\n')
    while old.stdout.readline() not in (b'0123456789ab 1 0\n', b''):
        pass
    once('--no-replicate-on-change', source, far, *connect)
    said = old.communicate(b'file 2 1 022 - 1 -\n./file\n3 m\noldm\n', timeout=20)[0]
    assert b'stop its staging was taken away' in said and not difference(source, far + '/src')


@fault_in_each_shell
def test_the_shell_of_the_session_before_is_ended_even_if_it_has_nothing_staged(tmp_path, shell):
    """Else it would not know that another session began, and do what comes to it late."""
    text = '%s\nmain "$0" %%s %s - "" %%s' % (fr.RECEIVER.replace('%', '%%'), shlex.quote(str(tmp_path / 'far')))
    write(str(tmp_path / 'far' / 'file'), 'so that nothing has to be staged')
    connect = shell_command(tmp_path, shell)
    with subprocess.Popen([*connect, '-c', text % ('0123456789ab', '-'), '-'], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as old:
        while old.stdout.readline() not in (b'0123456789ab listed\n', b''):
            pass
        subprocess.run([*connect, '-c', text % ('ba9876543210', '0123456789ab'), '-'], stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, timeout=20)
        old.communicate(b'remove 1 1 \n./file\n0\n', timeout=20)
    assert os.path.exists(str(tmp_path / 'far' / 'file'))


@fault_in_each_shell
@pytest.mark.parametrize('records', [b'file 1 1 022 - 1 -\n./file\n9 m\nhalf', b'part 1 0 = p\n9 m\nhalf',
                                     b'bulk 1 1 script\n.\n9 m\nhalf',
                                     b'dir 1 1 022\n./d', b'dir 1 1 022\n./d\n'])
def test_a_record_that_ends_in_its_midst_leaves_nothing(tmp_path, shell, records):
    text = session_text(tmp_path / 'far')
    subprocess.run([*shell_command(tmp_path, shell), '-c', text], input=b'meta 0 1 - 1000000000\n.\n0\n' + records,
                   stdout=subprocess.DEVNULL, timeout=20)
    assert os.listdir(str(tmp_path / 'far')) == []
    assert os.stat(str(tmp_path / 'far')).st_mtime == 10**9         # what came and went has left no trace


def test_two_that_replicate_to_the_same_place_are_noticed_and_one_ends(tmp_path):
    sources, far = [str(tmp_path / name / 'src') for name in 'ab'], str(tmp_path / 'far')
    for source in sources:
        write(source + '/file', source)
    os.mkdir(far)
    with Running(tmp_path, sources[0], far, 'dash') as one, Running(tmp_path, sources[1], far, 'dash', wait=False) as two:
        def ended():
            for i in range(100):        # so many that both have a staging at the same time before long
                for source in sources:
                    write('%s/%d' % (source, i), '%f' % time.monotonic())
            return [each for each in (one, two) if each.process.poll() is not None]
        first = until(ended, 60, lambda: one.log() + two.log())[0]
        assert first.process.returncode == 1 and 'another file_replicator replicates to ' + far in first.err()


def test_a_paused_far_side_goes_on_where_it_was(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'old')
    os.mkdir(far)
    with Running(tmp_path, source, far, 'bash') as running:
        before = running.connections()
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        write(source + '/file', 'new')
        write(source + '/big', FAULT_BIG)
        with pytest.raises(pytest.fail.Exception):
            until(lambda: open(far + '/src/file').read() == 'new', 1.0)
        for pid in before:
            os.kill(pid, signal.SIGCONT)
        until_equal(source, far + '/src', running=running)
        assert running.connections() == before and 'lost' not in running.err()


FAULT_NONSENSE = '''
text = b''
while b"main \\"$0\\" " not in text or not text.endswith(b'"$R" "$R"\\n'):
    text += os.read(0, 65536)
nonce = re.search(rb'main "\\$0" ([0-9a-f]{12})', text).group(1)
os.write(1, b'\\n' + nonce + b' ready\\n' + %s)
while os.read(0, 65536):
    pass
'''


def fault_nonsense(directory, says):
    """The text of a command that says nonsense the first time, and is a shell from then on."""
    path = fault_python(directory, 'nonsense', FAULT_NONSENSE % says)
    return 'if [ -e %s.met ]; then exec dash; fi; touch %s.met; exec %s' % (path, path, path)


FAULT_QUIET_NONSENSE = ["nonce + b' listed\\n' + nonce + b' 1 x\\n'", "nonce + b' listed\\n' + nonce + b'\\n'",
                        "nonce + b' listed\\n' + os.urandom(100) + nonce + b' stop\\n'"]


def test_silence_is_noticed_within_45_seconds_with_data_on_the_way_and_without(tmp_path):
    """All that has to be waited for, at once: two far sides that fall silent, and first connections that never answer."""
    names = ['idle', 'busy', 'flooded', 'edited', 'hooked', 'noisy']
    far = {'hooked': ['--remote-hook', 'true']}, {
        'hooked': ['-c', r'sed -u "/^hook [0-9]/,\$d" | sh'],           # it never begins
        'noisy': ['-c', '(while sleep 3; do echo noise; done) & exec sh']}
    never = {'sleep': ['sleep', '1000'], 'swallow': ['sh', '-c', 'cat >/dev/null'],
             'sed': ['sed', 's/sh/hs/'], 'babble': ['sh', '-c', 'while :; do echo nonsense; sleep 1; done']}
    with contextlib.ExitStack() as stack:
        runs, firsts, babblers = {}, {}, {}
        for number, says in enumerate(FAULT_QUIET_NONSENSE):        # nonsense that could be chatter, and then no answer
            directory = tmp_path / ('nonsense%d' % number)
            write(str(directory / 'src' / 'file'), 'data')
            os.mkdir(str(directory / 'far'))
            babblers[directory] = stack.enter_context(Running(
                tmp_path, str(directory / 'src'), str(directory / 'far'), 'sh', '-c', fault_nonsense(directory, says), wait=False))
        for name in names:
            write(str(tmp_path / name / 'src' / 'file'), 'old')
            os.makedirs(str(tmp_path / name / 'far'))
            runs[name] = stack.enter_context(Running(
                tmp_path, '--no-gitignore', *far[0].get(name, []), str(tmp_path / name / 'src'), str(tmp_path / name / 'far'),
                'sh', *far[1].get(name, [])))
        for name, words in never.items():
            write(str(tmp_path / name / 'src' / 'file'), 'old')
            firsts[name] = stack.enter_context(
                Running(tmp_path, str(tmp_path / name / 'src'), str(tmp_path / name / 'far'), *words, wait=False))
        for name, running in runs.items():
            for pid in running.connections():
                os.kill(pid, signal.SIGSTOP)
        write(str(tmp_path / 'busy' / 'src' / 'file'), 'new')
        write(str(tmp_path / 'flooded' / 'src' / 'big'), FAULT_BIG)
        edited = str(tmp_path / 'edited' / 'src' / 'file')

        def edit():                     # every four seconds: what only goes into the pipe is no sign of life
            text = 'at %d' % (time.monotonic() // 4)
            with open(edited) as file:
                before = file.read()
            if before != text:
                write(edited, text)

        end = time.monotonic() + FAULT_SILENT_SECONDS
        for name, running in runs.items():
            until(lambda: edit() or 'connection lost: nothing moved' in running.err(), end - time.monotonic(), running.log)
        for name, running in firsts.items():
            assert running.process.wait(max(0.1, end - time.monotonic())) == 1
            assert 'no shell answered' in running.err() and 'Traceback' not in running.err()
        for name, running in runs.items():
            until_equal(str(tmp_path / name / 'src'), str(tmp_path / name / 'far' / 'src'), running=running)
        runs['idle'].says('connected again')
        for directory, running in babblers.items():
            until_equal(str(directory / 'src'), str(directory / 'far' / 'src'), running=running)
    for name in [*names, *never]:
        fault_nothing_left(str(tmp_path / name / 'far'))


def test_a_far_side_that_falls_silent_in_its_listing_is_given_up_for_one_that_does_not(tmp_path, monkeypatch, capfd):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'data')
    os.mkdir(far)
    monkeypatch.setattr(fr, 'SILENT_SECONDS', 1)
    words = ['--wait', '--no-replicate-on-change', source, far, 'sh', '-c', fault_nonsense(tmp_path, "nonce + b' d 755'")]
    began = time.monotonic()
    assert fr.replicate(fr.parse(words)) == 0
    assert time.monotonic() - began < 8 and not difference(source, far + '/src')
    assert 'waiting for the far side: nothing moved for 1 seconds' in capfd.readouterr().err


@fault_in_each_shell
def test_a_connection_that_passes_bytes_one_by_one_is_slow_and_right(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    fault_all_records(source, far + '/src')
    once('--mirror', '--no-replicate-on-change', source, far, 'sh', '-c',
         'dd bs=1 2>/dev/null | "$@" | dd bs=1 2>/dev/null', '-', *shell_command(tmp_path, shell))
    assert not difference(source, far + '/src')


FAULT_SLOW_LINK = """
import os, queue, subprocess, threading, time
given, delay = queue.Queue(), 0

def take():
    data = True
    while data:
        data = os.read(0, 65536)
        given.put((time.monotonic() + delay, data))

threading.Thread(target=take, daemon=True).start()
far = subprocess.Popen(['bash'], stdin=subprocess.PIPE, bufsize=0)
for when, data in iter(given.get, None):
    if not data:
        break
    time.sleep(max(0, when - time.monotonic()))
    far.stdin.write(data)
    time.sleep(len(data) / 2e6)
far.stdin.close()
far.wait()
"""


@pytest.mark.parametrize('files, size, rate', [(300, 20000, '2e6'), (1, 6000000, '2e6'), (1, 1000000, '3e5')])
def test_a_slow_link_that_takes_all_at_once_is_not_taken_for_a_dead_one(tmp_path, monkeypatch, files, size, rate):
    """As with a network's deep buffers: nothing moves here while megabytes creep on."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for number in range(files):
        write('%s/%d' % (source, number), os.urandom(size), mtime_ns=10**18)
    fault_other_number(monkeypatch, tmp_path, 'SILENT_SECONDS = 12, 25 ', 'SILENT_SECONDS = 12, 2 ')
    link = sys.executable, '-c', FAULT_SLOW_LINK.replace('2e6', rate)
    assert once('--no-replicate-on-change', source, far, *link).stderr == ''
    assert not difference(source, far + '/src')


def test_a_link_on_which_the_first_record_takes_too_long_is_tried_with_smaller_ones(tmp_path, monkeypatch):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/large', os.urandom(600000))
    fault_other_number(monkeypatch, tmp_path, 'SILENT_SECONDS = 12, 25 ', 'SILENT_SECONDS = 12, 2 ')
    done = once('--no-replicate-on-change', source, far, sys.executable, '-c', FAULT_SLOW_LINK.replace('2e6', '6e4'))
    assert 'connection lost: nothing moved' in done.stderr
    assert not difference(source, far + '/src')


def test_where_nobody_watches_connections_that_always_end_too_early_are_given_up(tmp_path, monkeypatch):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/large', os.urandom(600000))
    fault_other_number(monkeypatch, tmp_path, 'GIVE_UP_SECONDS = 300 ', 'GIVE_UP_SECONDS = 2 ')
    done = once('--no-replicate-on-change', source, far, 'sh', '-c', 'dd bs=1 count=100000 2>/dev/null | bash', expect=1)
    assert 'for 2 seconds each connection ended before anything more was replicated: the connection command' in done.stderr
    fault_nothing_left(far)


def test_a_long_way_is_not_taken_for_a_slow_one(tmp_path):
    """If it were, less and less would be on the way, and this would take a minute."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/large', os.urandom(60 << 20))
    start = time.monotonic()
    once('--no-replicate-on-change', source, far, sys.executable, '-c',
         FAULT_SLOW_LINK.replace('2e6', '2e7').replace('delay = queue.Queue(), 0', 'delay = queue.Queue(), 0.7'), timeout=120)
    assert time.monotonic() - start < 15
    assert not difference(source, far + '/src')


def test_over_a_slow_link_a_file_that_is_saved_again_and_again_does_not_queue(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/a')
    with Running(tmp_path, source, far, sys.executable, '-c', FAULT_SLOW_LINK) as running:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            write(source + '/a', os.urandom(1000000))
            time.sleep(0.05)
        until_equal(source, far + '/src', 5, running=running)


def test_the_sums_of_all_files_may_take_longer_than_anything_else_may(tmp_path, monkeypatch):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/a', 'new')
    write(far + '/src/a', 'old')
    fault_command(tmp_path / 'shims-dash', 'sha256sum', '#!/bin/sh\n[ $# = 0 ] || sleep 3\nexec %s "$@"\n' % need('sha256sum'))
    fault_other_number(monkeypatch, tmp_path, 'SILENT_SECONDS = 12, 25 ', 'SILENT_SECONDS = 12, 2 ')
    words = '--no-replicate-on-change', '--checksum', source, far, *shell_command(tmp_path, 'dash')
    assert once(*words).stderr == ''
    assert not difference(source, far + '/src')


FAULT_NOISE = {
    'lines': 'echo Welcome; echo to the machine',
    'no newline at the end': 'printf "Welcome > "',
    'binary': 'head -c 5000 /dev/urandom',
    'a lot': 'head -c 3000000 /dev/zero | tr "\\0" "\\n"',
    'on standard error': 'echo Warning >&2; printf more >&2',
    'words of ours': 'echo 0123456789ab ready; echo ready; echo "x ready"',
    'late': '(sleep 0.2; echo late; printf "half a line"; sleep 0.2; echo later) &',
    'random all the time': '(for i in 1 2 3 4 5 6 7 8 9; do head -c 3000 /dev/urandom; sleep 0.05; done) &',
}


@fault_in_each_shell
def test_a_noisy_far_side_is_understood(tmp_path, shell):
    connect = shell_command(tmp_path, shell)

    def noisy(name):
        source, far = str(tmp_path / name / 'src'), str(tmp_path / name / 'far')
        fault_all_records(source)
        os.mkdir(far)
        once('--no-replicate-on-change', source, far, 'sh', '-c', FAULT_NOISE[name] + '\nexec "$@"', '-', *connect)
        assert not difference(source, far + '/src')
    fault_together([(name,) for name in FAULT_NOISE], noisy)


@pytest.mark.parametrize('says', ["nonce + b' 77 0\\n'", "nonce + b' listed\\n' + nonce + b' 77 0\\n'",
                                  "nonce + b' listed\\n' + nonce + b' 1 0\\n'",
                                  "nonce + b' listed\\n' + nonce + b' 1 0\\n' * 9",
                                  "nonce + b' f 644 x x x ./a//.\\n' + nonce + b' listed\\n' + nonce + b' + \\n' + nonce + b' 1 0\\n'",
                                  "nonce + b' f 644 1 1 1 ../../../etc/passwd//.\\n' + nonce + b' listed\\n' + nonce + b' 2 0\\n'",
                                  "nonce + b' listed\\n' + nonce + b' + tar nonsense\\n' + nonce + b' 1 0\\n'",
                                  "nonce + b' listed\\n' + nonce + b' ' + b'9' * 5000 + b' 0\\n'"])
def test_nonsense_after_ready_is_said_and_a_sane_far_side_takes_over(tmp_path, says):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'data')
    os.mkdir(far)
    program = fault_nonsense(tmp_path, says)
    if says.startswith("nonce + b' 77"):        # it never comes to an end, so it has to be cut
        with Running(tmp_path, '--wait', source, far, 'sh', '-c', program, wait=False) as running:
            until(lambda: os.path.exists(str(tmp_path / 'nonsense.met')))
            running.cut()
            running.in_step()
    else:
        with Running(tmp_path, '--wait', source, far, 'sh', '-c', program, wait=False) as running:
            running.in_step()
            assert not difference(source, far + '/src')
            assert re.search('connection lost|waiting for the far side', running.err()), running.log()
            assert '77' not in says or 'answers what nobody asked' in running.err()


@pytest.mark.parametrize('option', ['--mirror', '--clean-out-first'])
def test_a_far_side_that_names_what_is_outside_of_the_replica_is_not_believed(tmp_path, option):
    """It could have files sent that are beside the source, or removed that are beside the replica."""
    source, far = tmp_path / 'src', tmp_path / 'far'
    write(str(source / 'file'), 'data')
    write(str(tmp_path / 'secret/key'), 'secret')
    write(str(far / 'beside/file'), 'theirs')
    lies = ''.join('  echo "$nonce d 755 0 1.0 1 %s//."\\n' % path for path in ('.', './..', './../secret'))
    words = 'sh', '-c', "sed -u 's|^  list_mounts$|%s&|' | dash" % lies
    done = once(option, '--no-replicate-on-change', source, far, *words)
    assert '..' not in done.stdout and not difference(str(source), str(far / 'src')), done.stdout
    assert sorted(os.listdir(str(far))) == ['beside', 'src'] and (far / 'beside/file').exists()


def test_a_far_side_that_closes_only_its_output_is_left_and_connected_again(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'data')
    os.mkdir(far)
    done = once(source, far, 'sh', '-c', 'exec >&-; sleep 1000', expect=1, timeout=10)
    assert 'closed its output' in done.stderr
    relay, controls = fault_relay(tmp_path, 'dash')
    with Running(tmp_path, source, far, *relay) as running:
        write(controls + '/mute', '1')
        running.says('connected again')
        assert 'closed its output' in running.err()
        write(source + '/file', 'changed')
        until_equal(source, far + '/src', running=running)
    fault_nothing_left(far)


def test_a_listing_that_breaks_off_is_not_believed_where_it_did(tmp_path):
    """What is left of a line there is the name of another file, which would then be taken to stand there already."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/name', 'same size', 0o644, 10**18)
    write(far + '/src/name.old', 'same size', 0o644, 10**18)
    connect = shell_command(tmp_path, 'dash')
    fault_command(tmp_path / 'shims-dash', 'find',
                  '#!/bin/sh\nlisted=$(%s "$@")\nprintf %%s "${listed%%%%.old*}"\n' % need('find'))
    once('--no-replicate-on-change', source, far, *connect)
    assert fault_holds(far, 'src/name', b'same size')


FAULT_NO_ECHO = """
import os, pty, subprocess, sys, termios, threading, tty
ours, theirs = pty.openpty()
mode = termios.tcgetattr(theirs)
mode[3] &= ~termios.ECHO
termios.tcsetattr(theirs, termios.TCSANOW, mode)
if 'raw' in sys.argv:           # as behind ssh -tt where its own input is no terminal
    tty.setraw(theirs)
subprocess.Popen(['sh'], stdin=theirs, stdout=theirs, stderr=theirs)
threading.Thread(target=lambda: [os.write(1, os.read(ours, 9999)) for _ in iter(int, 1)], daemon=True).start()
while True:
    os.write(ours, os.read(0, 999) or os._exit(0))
"""


@pytest.mark.parametrize('words, says', [
    (['cat'], 'no shell: it gives back'), (['true'], 'ended with status 0'), (['false'], 'ended with status 1'),
    (['no-such-command-anywhere'], 'cannot run no-such-command-anywhere: No such file'), (['/etc/passwd'], 'ermission denied'),
    (['/'], 'cannot run /'), (['sh', '-c', 'echo "no such host" >&2; exit 255'], 'no such host.*ssh could not'),
    (['sh', '-c', 'exit 127'], 'not found'), (['sh', '-c', 'kill -9 $$'], 'signal 9'), (['head', '-c', '100'], 'ended with status 0'),
    ([sys.executable, '-c', 'import sys; sys.stdin.read(9)'], 'ended with status 0'),
    (['tee', '/dev/null'], 'no shell: it gives back'), ([sys.executable, '-c', 'import pty; pty.spawn("sh")'], 'goes through a terminal'),
    ([sys.executable, '-c', 'import pty; pty.spawn("cat")'], 'goes through a terminal'),
    (['sh', '-c', 'printf "Welcome\\r\\n"; exec cat'], 'no shell: it gives back'),
    pytest.param([sys.executable, '-c', FAULT_NO_ECHO], 'goes through a terminal', id='a terminal without echo'),
    pytest.param([sys.executable, '-c', FAULT_NO_ECHO, 'raw'], 'goes through a terminal', id='a terminal that changes little'),
    (['sh', '-c', 'echo; echo one; echo; echo two; echo >&2; exit 3'], 'status 3: one; two;')], ids=str)
def test_a_command_that_is_no_shell_ends_the_program_with_what_it_said(tmp_path, words, says):
    source = str(tmp_path / 'src')
    write(source + '/file', 'data')
    done = once(source, str(tmp_path / 'far'), *words, expect=1, timeout=FAULT_SILENT_SECONDS)
    assert re.search(says, done.stderr) and str(tmp_path / 'far') in done.stderr, done.stderr
    assert done.stderr.count('\n') <= 2 and not done.stdout


def test_tools_that_are_not_in_its_path_are_found_where_they_often_are(tmp_path):
    need_root()
    source, root = str(tmp_path / 'src'), dash_root(str(tmp_path / 'root'))
    fault_all_records(source, root + '/srv/src')
    os.makedirs(root + '/usr/local')
    for name in ('bin', 'tools'):
        os.rename(os.path.join(root, name), root + '/usr/local/' + name)
    os.mkdir(root + '/bin')
    for name in ('sh', 'dash'):
        os.rename(root + '/usr/local/bin/' + name, root + '/bin/' + name)
    once('--mirror', '--no-replicate-on-change', source, '/srv', 'env', 'PATH=/nonexistent', need('chroot'), root, '/bin/sh')
    assert not difference(source, root + '/srv/src', whole_seconds=True)


@pytest.mark.parametrize('shell', ['bash', 'dash'])
@pytest.mark.parametrize('path', ['PATH=.:%s', 'PATH=:%s'])
def test_no_file_of_the_replica_is_taken_for_a_tool(tmp_path, shell, path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for tool in ('cat', 'chmod', 'dd', 'find', 'ln', 'mkdir', 'mv', 'rm', 'rmdir', 'sha256sum', 'stat', 'tar', 'touch', 'wc'):
        write(source + '/' + tool, '#!/bin/sh\necho >"$0.was.run"\nexec %s "$@"\n' % need(tool), 0o755)
    env, usual, shell = shell_command(tmp_path, shell)
    with Running(tmp_path, source, far, env, path % usual[5:], shell) as running:
        write(source + '/more', 'more')
        os.unlink(source + '/ln')
        until_equal(source, far + '/src', running=running)


FAULT_STARTS = {
    'SHELLOPTS': 'exec env SHELLOPTS=errexit:nounset:noglob:noclobber {shell}',
    'xtrace': 'exec env SHELLOPTS=xtrace:verbose {shell} 2>/dev/null',
    '-e': 'exec {shell} -e', '-u': 'exec {shell} -u', '-C': 'exec {shell} -C', '-euC': 'exec {shell} -euC', '-f': 'exec {shell} -f',
    '-xv': 'exec {shell} -xv 2>/dev/null',
    'IFS': 'IFS=/01abcdefn; export IFS; exec {shell}', 'empty IFS': 'IFS=; export IFS; exec {shell}',
    'LANG': 'LANG=tr_TR.UTF-8 LC_ALL=ja_JP.SJIS LANGUAGE=de; export LANG LC_ALL LANGUAGE; exec {shell}',
    'no PATH': 'unset PATH; exec {shell}', 'strange PATH': 'PATH=/nonexistent::.; export PATH; exec {shell}',
    'ENV': 'ENV={prints} BASH_ENV={prints}; export ENV BASH_ENV; exec {shell}',
    'interactive': 'ENV={prints}; export ENV; exec {shell} -i 2>/dev/null',
    'umask 077': 'umask 077; exec {shell}', 'umask 777': 'umask 777; exec {shell}', 'umask 0': 'umask 0; exec {shell}',
    'CDPATH': 'mkdir -p {prints}.d/x; CDPATH={prints}.d:/:/tmp; cd /tmp; export CDPATH; exec {shell}',
    'tool options': 'TAR_OPTIONS=--verbose POSIXLY_CORRECT=1 LS_COLORS=x BLOCKSIZE=1 TMPDIR=/nonexistent; '
                    'export TAR_OPTIONS POSIXLY_CORRECT BLOCKSIZE TMPDIR; exec {shell}',
    'names of ours': 'nonce=x root=/ stage=/tmp temp=/etc/passwd staged=1 hook=false R=x p=/ line=/; '
                     'export nonce root stage temp staged hook R p line; exec {shell}',
    'no environment': 'exec env -i {shell}', 'closed standard error': 'exec {shell} 2>&-', 'a gone directory':
        'mkdir {prints}.d && cd {prints}.d && rmdir {prints}.d && exec {shell}',
    'without line editing': '[ {shell} = "$(command -v bash)" ] && exec {shell} --noediting -i 2>/dev/null; exec {shell}',
    'functions': 'exec env "BASH_FUNC_eval%%=() {{ :; }}" "BASH_FUNC_[%%=() {{ cat; }}" "BASH_FUNC_command%%=() {{ echo \\"\\$@\\"; }}" {shell}',
    'a head that fails': 'mkdir -p {prints}.d && ln -sf "$(command -v false)" {prints}.d/head && '
                         'PATH={prints}.d:$PATH && export PATH && exec {shell}',
    'a head that reads ahead': 'mkdir -p {prints}.d && ln -sf "$(command -v busybox)" {prints}.d/head && '
                               'PATH={prints}.d:$PATH && export PATH && exec {shell}',
}


@fault_in_each_shell
def test_a_shell_started_in_a_strange_way_is_right_all_the_same(tmp_path, shell):
    first = 'busybox' if shell == 'busybox sh' else shell
    path = ' '.join([need(first), *shell.split()[1:]])
    connect = [*shell_command(tmp_path, shell)[:-1], 'sh']      # so that it is this shell that runs the receiver, too

    def start(name):
        source, far = str(tmp_path / name / 'src'), str(tmp_path / name / 'far')
        prints = fault_command(tmp_path / name, 'prints', 'echo printed; set -u; alias mv=false rm=false dd=false cd=false\n')
        fault_all_records(source, far + '/src')
        text = FAULT_STARTS[name].format(shell=path, prints=shlex.quote(prints))
        done = once('--mirror', '--no-replicate-on-change', source, far, *connect, '-c', text)
        assert not difference(source, far + '/src') and not done.stderr, done.stderr
        write(source + '/more', 'one more', 0o640)
        shutil.rmtree(source + '/many')
        once('--mirror', '--no-replicate-on-change', source, far, *connect, '-c', text)
        assert not difference(source, far + '/src') and not glob.glob(prints + '.d/x/*')
    fault_together([(name,) for name in FAULT_STARTS], start)


def test_a_directory_made_anew_where_another_was_renamed_away_gets_its_time(tmp_path):
    """First it was to travel in an archive, with its time, then again by itself."""
    source, far = tmp_path / 'src', tmp_path / 'far'
    write(str(source / 'a/x'))
    os.makedirs(str(tmp_path / 'new/d'))
    os.utime(str(tmp_path / 'new/d'), (10**9, 10**9))
    with Running(tmp_path, source, far, 'bash') as running:
        running.process.send_signal(signal.SIGSTOP)     # so that all is seen at once
        os.rename(str(source / 'a'), str(source / 'z'))
        os.rename(str(tmp_path / 'new'), str(source / 'a'))
        os.mkdir(str(source / 'b'))
        os.mkdir(str(source / 'c'))
        running.process.send_signal(signal.SIGCONT)
        until_equal(str(source), str(far / 'src'), running=running)


@pytest.mark.parametrize('far', ['bash', 'busybox sh'])
def test_where_two_names_over_there_are_one_file_each_can_be_removed(tmp_path, far):
    """A rename of one to the other does nothing."""
    source, there = option_source(tmp_path, 'f')
    for top in (source, there):
        write(str(top / 'f'), mtime_ns=10**18)
        os.link(str(top / 'f'), str(top / 'g'))
    with option_watching(tmp_path, far=far) as running:
        os.remove(str(source / 'f'))
        until_equal(str(source), str(there), running=running)


def test_what_changes_in_a_directory_closed_to_its_owner_is_set_and_removed_there(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    write(source + '/a/x/y', 'y')
    write(source + '/a/z', 'z')
    os.chmod(source + '/a', 0o000)
    os.mkdir(far)
    fault_give(far)
    with Running(fault_open, source, far, *fault_other_user(fault_open)) as running:
        for change in [lambda: os.chmod(source + '/a/x', 0o700), lambda: os.utime(source + '/a/x', (1, 1)),
                       lambda: os.chmod(source + '/a/x/y', 0o400), lambda: os.chmod(source + '/a', 0o600),
                       lambda: (os.chmod(source + '/a', 0o755), os.chmod(source + '/a/x', 0o750)),
                       lambda: (os.chmod(source + '/a/x', 0o100), os.chmod(source + '/a', 0o000)),
                       lambda: os.remove(source + '/a/z')]:
            change()
            until_equal(source, far + '/src', running=running)
        assert 'changed over there' not in running.err()


@pytest.mark.parametrize('far', ['bash', 'busybox only'])
def test_setuid_and_setgid_arrive_though_the_far_user_is_not_root(fault_open, far):
    source, there, words = fault_open + '/src', fault_open + '/far', fault_other_user(fault_open)
    parent = there
    if far == 'busybox only':           # whose tar leaves them out
        root = busybox_root(fault_open + '/root')
        os.chmod(root + '/dev/null', 0o666)
        there, parent, words = root + '/far', '/far', [need('chroot'), '--userspec=65534:65534', root, '/bin/sh']
    os.mkdir(there)
    fault_give(there)
    for mode in (0o4755, 0o2755, 0o6711, 0o1755, 0o755):
        write(source + '/%o' % mode, 'x', mode)
    once('--no-replicate-on-change', source, parent, *words)
    assert not difference(source, there + '/src', whole_seconds=far != 'bash')


def test_what_a_remote_hook_reads_can_be_read_whatever_was_sent_before(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    os.mkdir(far)
    fault_give(far)
    write(source + '/f', 'x', 0o000)
    done = once('--no-replicate-on-change', '--remote-hook', 'tr "\\0" "!"', source, far, *fault_other_user(fault_open))
    assert 'remote hook: f!' in done.stderr, done.stderr


def test_a_git_that_waits_for_ever_is_ended_with_us(tmp_path):
    """A FIFO in the place of a .gitignore has it wait."""
    source, there = option_source(tmp_path, 'f')
    os.mkfifo(str(source / '.gitignore'))
    with option_watching(tmp_path, wait=False) as running:
        until(lambda: subprocess.run(['pgrep', '-f', 'git -C %s' % source], stdout=subprocess.DEVNULL).returncode == 0)
        running.process.terminate()
        assert running.process.wait(5) == 0
        assert subprocess.run(['pgrep', '-f', 'git -C %s' % source], stdout=subprocess.DEVNULL).returncode == 1


def test_the_value_of_an_option_may_begin_with_a_minus(tmp_path):
    source, there = option_source(tmp_path, '-x', 'f')
    option_once(tmp_path, '--exclude', '-x')
    assert option_paths(there) == ['f']


# ---- the source

@pytest.mark.parametrize('shell', ['bash', 'dash', 'busybox sh'])
@pytest.mark.parametrize('how', ['moved', 'copied', 'link', 'new'])
def test_a_replica_in_whose_place_another_directory_was_put_is_noticed(tmp_path, how, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    replica, old = far + '/src', far + '/old'
    for name in ('a', 'd/b'):
        write(os.path.join(source, name), 'first')
    os.mkdir(far)
    with Running(tmp_path, source, far, *shell_command(tmp_path, shell)) as running:
        until(lambda: not fault_staging(replica))
        if how == 'new':
            shutil.rmtree(replica)
            os.mkdir(replica)
        else:
            os.rename(replica, old)
            os.mkdir(far + '/other')
            {'moved': lambda: os.mkdir(replica), 'copied': lambda: shutil.copytree(old, replica),
             'link': lambda: os.symlink('other', replica)}[how]()
        before = tree_of(old) if how != 'new' else None
        write(source + '/a', 'second')
        write(source + '/new', 'new')
        until_equal(source, replica, 20, running=running)
        until(lambda: running.out().endswith('in step\n'), 10, running.log)
        assert how == 'new' or tree_of(old) == before and not os.listdir(far + '/other')


@pytest.mark.parametrize('shell', ['bash', 'dash', 'busybox sh'])
def test_a_directory_over_there_that_we_may_not_search_is_named_and_all_else_arrives(fault_open, tmp_path, shell):
    source, far = fault_open + '/src', fault_open + '/far'
    connect = fault_other_user(fault_open, shell)
    for name in ('x/a', 'y/b'):
        write(os.path.join(source, name), 'first')
    os.mkdir(far)
    fault_give(far)
    with Running(tmp_path, source, far, *connect) as running:
        os.chown(far + '/src/x', 0, 0)
        os.chmod(far + '/src/x', 0o700)
        write(source + '/x/a', 'second')
        write(source + '/large', bytes(3 << 20))
        write(source + '/y/b', 'second')
        running.says('x/a: ')
        until(lambda: fault_holds(far, 'src/large', bytes(3 << 20)) and fault_holds(far, 'src/y/b', b'second'), 20, running.log)
        assert 'connection lost' not in running.err(), running.err()
        assert 'ermission denied' in running.err()
        fault_give(far + '/src/x')
        until_equal(source, far + '/src', FAULT_ROOM_SECONDS, running=running)


@pytest.mark.parametrize('shell', ['bash', 'dash', 'busybox sh'])
def test_a_directory_that_was_closed_over_there_is_opened_again(fault_open, tmp_path, shell):
    source, far = fault_open + '/src', fault_open + '/far'
    connect = fault_other_user(fault_open, shell)
    for name in ('x/a', 'x/b', 'y/a'):
        write(os.path.join(source, name), 'first')
    os.mkdir(far)
    fault_give(far)
    with Running(tmp_path, source, far, *connect) as running:
        for mode in (0o555, 0o000):
            os.chmod(far + '/src/x', mode)
            write(source + '/x/a', 'with %o' % mode)
            with contextlib.suppress(FileNotFoundError):
                os.remove(source + '/x/b')
            until_equal(source, far + '/src', 20, running=running)
            until(lambda: running.out().endswith('in step\n'), 10, running.log)


@pytest.mark.parametrize('option', ['', '--mirror'])
@pytest.mark.parametrize('theirs', [(), ('theirs',)])
def test_a_file_that_became_a_directory_over_there_and_goes_here_keeps_nothing_out_of_step(tmp_path, option, theirs):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    replica = far + '/src'
    for name in ('f', 'g'):
        write(os.path.join(source, name), 'first')
    os.mkdir(far)
    with Running(tmp_path, *option.split(), source, far, 'dash') as running:
        os.remove(replica + '/f')
        os.mkdir(replica + '/f')
        for name in theirs:
            write(replica + '/f/' + name)
        os.remove(source + '/f')
        until(lambda: running.out().count('in step') >= 2, 10, running.log)
        assert os.path.exists(replica + '/f') == bool(theirs and not option), running.log()
        assert 'is tried again' not in running.err()


@pytest.mark.parametrize('shell', ['bash', 'dash', 'busybox sh'])
def test_a_link_put_in_the_way_while_the_bytes_are_on_their_way_is_not_followed(tmp_path, shell):
    source, far, outside = str(tmp_path / 'src'), str(tmp_path / 'far'), str(tmp_path / 'outside')
    replica = far + '/src'
    write(source + '/x/f', 'first')
    for directory in (far, outside):
        os.mkdir(directory)
    relay, _ = fault_relay(tmp_path, *shell_command(tmp_path, shell), slow=0.15)
    with Running(tmp_path, source, far, *relay) as running:
        running.process.send_signal(signal.SIGSTOP)         # so that it sends them together
        for number in range(5):
            write(source + '/x/%d' % number, os.urandom(80000))
        running.process.send_signal(signal.SIGCONT)
        until(lambda: any(os.listdir(each) for each in glob.glob(replica + '/.file_replicator.*')), 10, running.log)
        os.rename(replica + '/x', replica + '/y')
        os.symlink(outside, replica + '/x')
        until(lambda: os.path.isfile(replica + '/x/4') and not os.path.islink(replica + '/x'), 30, running.log)
        assert os.listdir(outside) == []


def test_a_large_file_that_is_replaced_on_its_way_ends_up_right(tmp_path):
    """Among so many other changes that what is known of it waits for its turn."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/many/first')
    os.mkdir(far)
    relay, _ = fault_relay(tmp_path, 'dash', slow=0.003)
    with Running(tmp_path, source, far, *relay) as running:
        write(source + '/z', os.urandom(24 << 20))
        until(lambda: any(os.path.getsize(each) for each in glob.glob(far + '/src/.file_replicator.*/part*')), 10, running.log)
        write(str(tmp_path / 'new'), os.urandom(24 << 20))
        running.process.send_signal(signal.SIGSTOP)         # so that it sees all this at once
        for number in range(1500):
            write(source + '/many/%d' % number, 'x' * 1000)
        os.rename(str(tmp_path / 'new'), source + '/z')
        os.chmod(source + '/z', 0o640)
        running.process.send_signal(signal.SIGCONT)
        until(lambda: running.out().count('in step') >= 2, 60, running.log)
        until_equal(source, far + '/src', 10, running=running)


@pytest.mark.parametrize('mode', [0o300, 0o400])
def test_a_source_that_cannot_be_listed_or_entered_is_not_one_that_was_emptied(tmp_path, fault_not_root, mode):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for name in ('g', 'a/f'):
        write(os.path.join(source, name), 'first')
    shutil.copytree(source, far + '/src')
    os.chmod(source, mode)
    try:
        once('--mirror', '--no-replicate-on-change', source, far, 'bash', expect=1)
    finally:
        os.chmod(source, 0o755)
    assert option_paths(far + '/src') == ['a', 'a/f', 'g']


def test_a_source_that_goes_is_not_taken_for_empty_by_a_new_connection(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for number in range(3000):
        write(source + '/%d/%d' % (number % 30, number), 'x')
    os.mkdir(far)
    with Running(tmp_path, source, far, 'dash') as running:
        shutil.rmtree(source)           # it looks before that is over
        running.says('is gone')

        def at_rest():                  # what it saw go before that goes over there
            there = option_paths(far + '/src')
            time.sleep(0.5)
            return [there] if there == option_paths(far + '/src') else []
        there = until(at_rest)[0]
        running.cut()
        running.says('connected again')
        with pytest.raises(BaseException):      # in two seconds nothing goes
            until(lambda: option_paths(far + '/src') != there, 2)
        write(source + '/back')
        until(lambda: option_has(far + '/src', 'back'), 10, running.log)


def test_a_source_that_is_made_anew_while_somebody_works_in_the_old_one_is_followed(tmp_path):
    """As with rm -rf and git clone from a shell that stands in it: then inotify does not tell that it went."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/old')
    os.mkdir(far)
    with Running(tmp_path, source, far, 'bash') as running:
        somebody = subprocess.Popen(['sleep', '60'], cwd=source)
        try:
            shutil.rmtree(source)
            write(source + '/new', 'first')
            until(lambda: fault_holds(far + '/src', 'new', b'first'), 30, running.log)
            write(source + '/new', 'second')
            until(lambda: fault_holds(far + '/src', 'new', b'second'), 10, running.log)
            shutil.rmtree(source)
            running.says('is gone')
        finally:
            somebody.kill()
            somebody.wait()


def test_a_mode_that_somebody_else_put_right_over_there_is_no_problem_any_more(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for name in ('f', 'g'):
        write(os.path.join(source, name), 'first')
    os.mkdir(far)
    connect = shell_command(tmp_path, 'dash')
    fault_command(tmp_path / 'shims-dash', 'chmod', '#!/bin/sh\ncase "$*" in *f) [ -e %s/fine ] || { echo refused; exit 1; } ;; esac\n'
                  'exec %s "$@"\n' % (tmp_path, need('chmod')))
    with Running(tmp_path, source, far, *connect) as running:
        os.chmod(source + '/f', 0o700)
        running.says('not in step')
        os.chmod(far + '/src/f', 0o700)
        write(str(tmp_path / 'fine'))
        running.cut()
        until(lambda: running.out().endswith('in step\n') and running.out().count('in step') > 1, 10, running.log)


def test_directories_deeper_than_a_program_may_call_itself_arrive_and_are_followed(tmp_path):
    source, far, depth = str(tmp_path / 'src'), str(tmp_path / 'far'), 1100
    os.mkdir(far)
    at = source + '/d' * depth
    os.makedirs(source)
    subprocess.run(['mkdir', '-p', at], check=True)         # os.makedirs calls itself
    try:
        with Running(tmp_path, source, far, 'dash') as running:
            write(at + '/f', 'edited')
            until(lambda: fault_holds(far, 'src' + '/d' * depth + '/f', b'edited'), 20, running.log)
            os.remove(at + '/f')
            running.cut()
            until(lambda: not os.path.exists(far + '/src' + '/d' * depth + '/f'), 20, running.log)
    finally:
        subprocess.run(['rm', '-rf', source, far], check=True)      # nor can pytest remove it


def test_a_directory_that_cannot_be_listed_keeps_its_contents_over_there_when_it_is_renamed(tmp_path, fault_not_root):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    replica = far + '/src'
    write(source + '/d/f', 'first')
    os.mkdir(far)
    with Running(tmp_path, source, far, 'bash') as running:
        os.chmod(source + '/d', 0o000)
        try:
            running.says('d: cannot be listed')
            os.rename(source + '/d', source + '/e')
            until(lambda: 'renamed d -> e' in running.out(), 10, running.log)
            write(source + '/later')
            until(lambda: os.path.exists(replica + '/later'), 10, running.log)
            os.chmod(replica + '/e', 0o700)
            assert fault_holds(replica, 'e/f', b'first'), running.log()
            os.utime(source + '/e')
            running.says('e: cannot be listed')
            write(source + '/last')
            until(lambda: os.path.exists(replica + '/last'), 10, running.log)
            said = running.err()
            assert said.count(' d: cannot be listed') == said.count(' e: cannot be listed') == 1, said
        finally:
            os.chmod(source + '/e', 0o755)
        until_equal(source, replica, 20, running=running)


def test_what_could_not_be_looked_at_and_is_gone_does_not_keep_it_out_of_step(tmp_path, fault_not_root):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for name in ('x', 'y'):
        write(source + '/d/' + name)
    os.mkdir(far)
    os.chmod(source + '/d', 0o444)
    try:
        with Running(tmp_path, source, far, 'bash', wait=False) as running:
            running.says('not in step')
            running.process.send_signal(signal.SIGSTOP)     # so that it sees both at once
            os.chmod(source + '/d', 0o755)
            os.remove(source + '/d/x')
            running.process.send_signal(signal.SIGCONT)
            until_equal(source, far + '/src', 10, running=running)
            until(lambda: running.out().endswith('in step\n'), 10, running.log)
    finally:
        os.chmod(source + '/d', 0o755)


@pytest.mark.parametrize('shell', ['bash', 'dash', 'busybox sh'])
def test_a_time_that_cannot_be_set_below_a_closed_directory_is_no_change_over_there(fault_open, tmp_path, shell):
    source, far = fault_open + '/src', fault_open + '/far'
    connect = fault_other_user(fault_open, shell)
    for root in (source, far + '/src'):
        os.makedirs(root + '/d/sub')
        os.utime(root + '/d/sub', (1, 10**9 + len(root)))
        os.chmod(root + '/d', 0o555)
    fault_give(far, far + '/src', far + '/src/d')
    once('--no-replicate-on-change', source, far, *connect, expect=None)
    with Running(tmp_path, source, far, *connect) as running:
        assert 'changed over there' not in running.err(), running.err()


def test_what_went_from_a_directory_that_could_not_be_listed_goes_once_it_can(tmp_path, fault_not_root):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/d/gone')
    write(source + '/d/stays')
    with Running(tmp_path, source, far, 'bash') as running:
        os.chmod(source + '/d', 0o311)
        running.says('cannot be listed')
        os.unlink(source + '/d/gone')
        write(source + '/later')        # once it is there, that was looked at
        until(lambda: os.path.exists(far + '/src/later'), 20, running.log)
        assert os.path.exists(far + '/src/d/gone')
        os.chmod(source + '/d', 0o755)
        until_equal(source, far + '/src', running=running)


def test_what_could_not_be_listed_and_is_gone_does_not_keep_it_out_of_step(tmp_path, fault_not_root):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/a')
    os.mkdir(far)
    with Running(tmp_path, source, far, 'bash') as running:
        os.mkdir(source + '/x')
        os.chmod(source + '/x', 0o000)
        running.says('x: cannot be listed')
        os.rmdir(source + '/x')
        write(source + '/b')
        until_equal(source, far + '/src', 10, running=running)
        until(lambda: running.out().endswith('in step\n'), 10, running.log)


@pytest.mark.parametrize('shell', ['bash', 'busybox sh'])
def test_what_is_removed_far_below_a_closed_directory_goes_over_there_too(fault_open, tmp_path, shell):
    source, far = fault_open + '/src', fault_open + '/far'
    connect = fault_other_user(fault_open, shell)
    for name in ('f', 'g', 'h/i'):
        write(source + '/d/e/' + name, 'first')
    os.chmod(source + '/d', 0o000)
    os.mkdir(far)
    fault_give(far)
    with Running(tmp_path, source, far, *connect) as running:
        os.remove(source + '/d/e/g')
        os.remove(source + '/d/e/h/i')
        write(source + '/d/e/f', 'second')
        until_equal(source, far + '/src', 10, running=running)
        until(lambda: running.out().endswith('in step\n'), 10, running.log)
        assert 'changed over there' not in running.err()


def test_what_cannot_be_read_is_named_and_nothing_of_it_is_removed(tmp_path, fault_not_root):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    replica = far + '/src'
    for name in ('file', 'closed/in', 'closed/deep/er', 'half/in', 'late/in', 'fine'):
        write(os.path.join(source, name), 'first')
    write(source + '/shut', 'never read', 0o000)
    os.mkdir(far)
    for name, mode in (('closed', 0o000), ('half', 0o444)):         # half: the names can be read, and no more
        shutil.copytree(os.path.join(source, name), os.path.join(replica, name))        # of an earlier run
        os.chmod(os.path.join(source, name), mode)
    try:
        done = once('--mirror', '--no-replicate-on-change', source, far, 'bash', expect=1)
        for name in ('shut: .*ermission denied', 'closed: .*ermission denied'):
            assert re.search('file_replicator: ' + name, done.stderr), done.stderr
        for name in ('closed/deep/er', 'half/in', 'fine'):
            assert fault_holds(replica, name, b'first')
        assert 'in step' not in done.stdout
        with Running(tmp_path, '--mirror', source, far, 'bash', wait=False) as running:
            running.says('not in step')
            write(source + '/closed/new', 'new')
            os.chmod(source + '/closed', 0o755)             # while we watch
            until(lambda: fault_holds(replica, 'closed/new', b'new'), 20, running.log)
            os.chmod(source + '/late', 0o000)
            running.says('late: cannot be listed')
            os.chmod(source + '/file', 0o000)
            write(source + '/fine', 'second')
            until(lambda: fault_holds(replica, 'fine', b'second'))
            assert fault_holds(replica, 'late/in', b'first') or not os.access(replica + '/late', os.X_OK)
            os.chmod(source, 0o000)
            write(source + '/fine', 'third')
            running.says('fine: cannot be looked at')
            assert fault_holds(replica, 'fine', b'second')
            os.chmod(source, 0o755)
            for name in ('half', 'late'):
                os.chmod(os.path.join(source, name), 0o755)
            for name in ('file', 'shut'):
                os.chmod(os.path.join(source, name), 0o644)
            until_equal(source, replica, FAULT_ROOM_SECONDS, running=running)
            until(lambda: running.out().splitlines()[-1] == 'in step')
    finally:
        for name in ('closed', 'half', 'late', '.'):
            os.chmod(os.path.join(source, name), 0o755)


@pytest.mark.parametrize('options', [(), ('--poll', '.5')])
def test_what_could_not_be_looked_at_and_is_gone_is_no_problem_any_more(tmp_path, fault_not_root, options):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/half/in', 'never seen')
    os.chmod(source + '/half', 0o444)
    try:
        with Running(tmp_path, *options, source, far, 'bash', wait=False) as running:
            running.says('not in step')
            running.process.send_signal(signal.SIGSTOP)         # so that it never sees what is in it
            os.chmod(source + '/half', 0o755)
            os.remove(source + '/half/in')
            running.process.send_signal(signal.SIGCONT)
            until(lambda: running.out().endswith('in step\n'), 10, running.log)
            assert os.listdir(far + '/src/half') == []
    finally:
        os.chmod(source + '/half', 0o755)


def test_a_file_that_the_disk_cannot_read_to_its_end_is_named_and_what_stood_there_stays(fault_open):
    fault_root()
    source, replica, disk = fault_open + '/src', fault_open + '/far/src', fault_open + '/disk'
    write(disk + '.d/new', FAULT_BIG[:3000000])
    write(disk + '.d/patched', FAULT_BIG[:3000000])
    write(disk + '.d/small', FAULT_BIG[:50000])
    write(disk + '.d/fine', 'fine')
    write(replica + '/patched', FAULT_BIG[9:3000000])           # of an earlier run
    write(replica + '/small', 'older')
    os.mkdir(source)
    with open(disk, 'wb') as file:
        file.truncate(16 << 20)
    subprocess.run([need('mke2fs'), '-q', '-t', 'ext2', '-d', disk + '.d', disk], check=True)
    for name in ('new', 'patched', 'small'):    # they are in no place from their thirteenth block on
        words = 'set_inode_field /%s block[IND] 4000000000' % name
        subprocess.run([need('debugfs'), '-w', '-R', words, disk], stderr=subprocess.DEVNULL, check=True)
    subprocess.run(['mount', '-o', 'loop,ro', disk, source], check=True)        # fault_open unmounts it
    done = once('--no-replicate-on-change', source, fault_open + '/far', 'bash', timeout=20, expect=1)
    for name in ('new', 'patched', 'small'):
        assert re.search('file_replicator: %s: cannot be read: ' % name, done.stderr), done.stderr
    assert not os.path.lexists(replica + '/new') and fault_holds(replica, 'patched', FAULT_BIG[9:3000000])
    assert fault_holds(replica, 'fine', b'fine') and fault_holds(replica, 'small', b'older')
    assert 'in step' not in done.stdout


def test_files_that_vanish_grow_shrink_and_turn_into_others_end_up_right(tmp_path):
    """Done so fast that many do it between our look and our reading."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(source)
    os.mkdir(far)
    write(source + '/large', FAULT_BIG)
    dice = random.Random(11)
    with Running(tmp_path, source, far, 'dash') as running:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            path = '%s/%d' % (source, dice.randrange(8))
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            kind = dice.randrange(5)
            if kind == 0:
                os.mkfifo(path)
            elif kind == 1:
                os.symlink('/dev/zero', path)
            elif kind > 2:
                write(path, FAULT_BIG[:dice.choice([10, 70000, 3000000])])
            if dice.random() < 0.3 and os.path.isfile(path) and not os.path.islink(path):
                os.truncate(path, dice.choice([0, 5, 40000]))
            if dice.random() < 0.1:
                os.truncate(source + '/large', dice.randrange(6 << 20))
            if dice.random() < 0.2:
                with open(source + '/large', 'ab') as file:
                    file.write(FAULT_BIG[:2000000])
        for number in range(8):
            with contextlib.suppress(OSError):
                if stat.S_ISFIFO(os.lstat('%s/%d' % (source, number)).st_mode):
                    os.remove('%s/%d' % (source, number))
        until_equal(source, far + '/src', 60, running=running)
        assert running.connections() and 'lost' not in running.err()


@pytest.mark.parametrize('change, times, sent', [('write', 1, 1), ('write', 3, 2), ('shrink', 3, 1)],
                         ids=['once', 'each time it is sent', 'shorter each time it is sent'])
def test_a_large_file_that_changes_while_it_is_sent_once_ends_up_right(tmp_path, change, times, sent):
    """Nobody watches, so no event tells. It never takes its place with zeros for what is no more in it."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/large', FAULT_BIG[:3600000])
    os.mkdir(far)
    connect, controls = fault_relay(tmp_path, 'dash', slow=0.003)
    with Running(tmp_path, '--no-replicate-on-change', source, far, *connect, wait=False) as running:
        for number in range(1, times + 1):
            until(lambda: any(os.path.getsize(os.path.join(d, name)) for staged in fault_staging(far)
                              for d, _, names in os.walk(staged) for name in names if name == 'part%d' % number),
                  20, running.log)
            if change == 'shrink':
                os.truncate(source + '/large', 3600000 - number * 400000)
            else:
                with open(source + '/large', 'r+b') as file:
                    file.write(b'changed %d' % number)
        assert running.process.wait(30) == 0 and not difference(source, far + '/src')
        assert running.out().count('sent large') == sent


def test_files_rewritten_all_the_time_do_not_keep_others_waiting_and_arrive_themselves(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(far)
    write(source + '/small', 'old')
    write(source + '/large', FAULT_BIG)
    write(source + '/log', '')
    over = threading.Event()

    def rewrite():
        n = 0
        with open(source + '/log', 'ab', buffering=0) as log, open(source + '/large', 'r+b', buffering=0) as large:
            while not over.is_set():
                n += 1
                log.write(b'line %d\n' % n)
                write(source + '/small', 'number %d' % n)
                large.seek(n * 4096 % (6 << 20))
                large.write(b'%d' % n)
                time.sleep(0.002)
    with Running(tmp_path, source, far, 'dash') as running:
        thread = threading.Thread(target=rewrite)
        thread.start()
        try:
            for number in range(8):
                write(source + '/other', 'other %d' % number)
                until(lambda: fault_holds(far, 'src/other', b'other %d' % number), 3, running.log)
            for name in ('small', 'large', 'log'):          # not only at the end
                with open(os.path.join(far, 'src', name), 'rb') as file:
                    seen = file.read()
                until(lambda: not fault_holds(far, 'src/' + name, seen), 10, lambda: name + running.log())
        finally:
            over.set()
            thread.join()
        until_equal(source, far + '/src', running=running)


# A slow connection that rather takes more than it passes on, but holds no more bytes than its first word says.
FAULT_BUFFER = '''
most, held = int(sys.argv[1]), b''
far = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE, bufsize=0)
while True:
    if select.select([0] if len(held) < most else [], [], [], 0.003)[0]:
        data = os.read(0, 16384)
        if not data:
            break
        held += data
    elif held:
        held = held[far.stdin.write(held[:16384]):]
while held:
    held = held[far.stdin.write(held):]
'''


@pytest.mark.parametrize('most, before', [(1, 150), (1 << 30, 260)], ids=['little on the way', 'much on the way'])
def test_a_fresh_edit_goes_before_the_backlog(tmp_path, monkeypatch, most, before):
    fault_other_number(monkeypatch, tmp_path, 'WINDOW_BYTES = 32 << 20', 'WINDOW_BYTES = 8 << 20')
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for i in range(320):
        write('%s/backlog/%d' % (source, i), FAULT_BIG[:50000])
    os.mkdir(far)
    connect = fault_python(tmp_path, 'buffer', FAULT_BUFFER)
    with Running(tmp_path, source, far, connect, most, 'dash', wait=False) as running:
        until(lambda: os.path.exists(far + '/src/backlog'), 20, running.log)
        write(source + '/fresh', 'fresh')
        until(lambda: fault_holds(far, 'src/fresh', b'fresh'), 20, running.log)
        assert len(os.listdir(far + '/src/backlog')) < before


def test_a_fresh_edit_goes_before_what_is_new_though_both_are_seen_at_once(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/edited', 'first')
    os.mkdir(far)
    connect = fault_python(tmp_path, 'buffer', FAULT_BUFFER)
    with Running(tmp_path, source, far, connect, 1, 'dash') as running:
        running.process.send_signal(signal.SIGSTOP)
        for i in range(320):
            write('%s/backlog/%d' % (source, i), FAULT_BIG[:50000])
        write(source + '/edited', 'then')
        running.process.send_signal(signal.SIGCONT)
        until(lambda: fault_holds(far, 'src/edited', b'then'), 20, running.log)
        assert not os.path.exists(far + '/src/backlog') or len(os.listdir(far + '/src/backlog')) < 100


@pytest.mark.parametrize('together', [False, True])
def test_a_fresh_edit_does_not_wait_for_thousands_of_new_times(tmp_path, together):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    names = ['old/%04d' % number for number in range(6000)]
    for name in ('old/edited', *names):
        write(os.path.join(source, name), 'first')
    os.mkdir(far)
    with Running(tmp_path, source, far, 'dash') as running:
        running.process.send_signal(signal.SIGSTOP)
        for number, name in enumerate(names):
            os.utime(os.path.join(source, name), ns=(0, 10**18 + number * 10**9))
        if together:
            write(source + '/old/edited', 'then')
        running.process.send_signal(signal.SIGCONT)
        until(lambda: any(os.stat(os.path.join(far, 'src', name)).st_mtime < 1.1e9 for name in names), 20, running.log)
        if not together:
            write(source + '/old/edited', 'then')
        until(lambda: fault_holds(far, 'src/old/edited', b'then'), 20, running.log)
        done = sum(os.stat(os.path.join(far, 'src', name)).st_mtime < 1.1e9 for name in names)
        assert done < (1000 if together else 4000)
        until_equal(source, far + '/src', 30, running=running)


@pytest.mark.parametrize('change', ['rm a', 'mv a b', 'rm -r d', 'mv d e'])
def test_what_was_about_to_go_when_the_connection_ended_goes_all_the_same(tmp_path, change):
    source, far, shims = str(tmp_path / 'src'), str(tmp_path / 'far'), tmp_path / 'shims-dash'
    write(source + '/a', 'data')
    write(source + '/d/in', 'data')
    os.mkdir(far)
    connect = shell_command(tmp_path, 'dash')
    for tool in ('rm', 'rmdir', 'mv'):
        fault_command(shims, tool, '#!/bin/sh\n[ ! -e {0}/stuck ] || {{ : >{0}/hit; exec sleep 30 >/dev/null 2>&1; }}\nexec {1} "$@"\n'.format(
            tmp_path, need(tool)))
    with Running(tmp_path, source, far, *connect) as running:
        write(str(tmp_path / 'stuck'))
        subprocess.run(['sh', '-c', change], cwd=source, check=True)
        until(lambda: (tmp_path / 'hit').exists(), 10, running.log)
        running.cut()
        os.unlink(str(tmp_path / 'stuck'))
        until_equal(source, far + '/src', running=running)


@pytest.mark.parametrize('count, size', [(1, 3000000), (120, 50000)], ids=['a large file', 'many files'])
def test_bytes_that_changed_and_kept_size_and_time_arrive_though_the_connection_ends_before_their_turn(tmp_path, count, size):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for number in range(count):
        write('%s/%d' % (source, number), FAULT_BIG[:size], mtime_ns=10**18)
    connect, controls = fault_relay(tmp_path, 'dash')
    with Running(tmp_path, source, far, *connect) as running:
        until_equal(source, far + '/src', running=running)
        write(controls + '/slow', '0.01')
        running.cut()
        running.in_step(2)
        running.process.send_signal(signal.SIGSTOP)     # so that it sees all at once
        for number in range(count):
            write('%s/%d' % (source, number), FAULT_BIG[-size:], mtime_ns=10**18)
        running.process.send_signal(signal.SIGCONT)
        until(lambda: any(glob.glob(d + '/part*') for d in fault_staging(far)) or running.out().count('sent 0') > 1,
              20, running.log)
        running.cut()
        os.unlink(controls + '/slow')
        until_equal(source, far + '/src', running=running)


def test_what_failed_but_was_done_all_the_same_goes_when_it_goes_here(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    connect = shell_command(tmp_path, 'dash')
    os.mkdir(source)
    fault_command(tmp_path / 'shims-dash', 'mv', '#!/bin/sh\n%s "$@"\ncase $* in *bad*) exit 1; esac\n' % need('mv'))
    with Running(tmp_path, source, far, *connect) as running:
        write(source + '/bad', 'data')
        running.says('bad: ')
        os.unlink(source + '/bad')
        until_equal(source, far + '/src', running=running)


def test_a_connection_that_ends_in_the_midst_of_the_first_look_makes_it_look_again(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for number in range(2000):
        write('%s/%d/f' % (source, number))
    once('--wait', '--no-replicate-on-change', source, far, 'sh', '-c', '[ -e "$0" ] || { : >"$0"; exit 1; }; exec bash',
         str(tmp_path / 'tried'))
    assert not difference(source, far + '/src')


def test_what_changes_all_the_time_is_sent_as_often_as_the_far_side_can_follow(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/log', '')
    os.mkdir(far)
    connect = shell_command(tmp_path, 'dash')
    fault_command(tmp_path / 'shims-dash', 'mv', '#!/bin/sh\nsleep 0.03\nexec %s "$@"\n' % need('mv'))
    with Running(tmp_path, source, far, *connect) as running:
        for number in range(400):
            write(source + '/log', 'line %d' % number)
            time.sleep(0.003)           # the pace of the writer
        until_equal(source, far + '/src', running=running)
        assert running.out().count('sent log') < 200


def test_a_new_directory_keeps_its_time_when_something_is_moved_into_it_at_once(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/old/in', 'data')
    os.mkdir(far)
    with Running(tmp_path, source, far, 'bash') as running:
        running.process.send_signal(signal.SIGSTOP)
        for name in 'abcd':
            os.makedirs('%s/new/%s' % (source, name))
        os.rename(source + '/old', source + '/new/old')
        running.process.send_signal(signal.SIGCONT)
        until_equal(source, far + '/src', running=running)


def test_special_files_are_named_once_and_never_opened(tmp_path):
    import inotify_simple
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'data')
    os.mkdir(far)
    os.mkfifo(source + '/fifo')
    there = socket.socket(socket.AF_UNIX)
    there.bind(source + '/socket')
    names = ['fifo', 'socket']
    if os.geteuid() == 0:
        os.mknod(source + '/device', stat.S_IFCHR | 0o666, os.makedev(1, 5))
        names.append('device')
    with contextlib.closing(there), inotify_simple.INotify() as inotify:
        inotify.add_watch(source, inotify_simple.flags.OPEN)
        with Running(tmp_path, source, far, 'bash') as running:
            os.mkfifo(source + '/fifo-later')
            write(source + '/file', 'changed')
            os.remove(source + '/file')
            os.mkfifo(source + '/file')
            names += ['fifo-later', 'file']
            until(lambda: not os.path.lexists(far + '/src/file'))
            until(lambda: all(re.search('file_replicator: %s: is left out' % name, running.err()) for name in names))
            assert os.listdir(far + '/src') == []
            assert running.err().count('fifo: ') == 1
        assert not {event.name for event in inotify.read(timeout=0)} & set(names) - {'file'}


def fault_ours(replica):
    """What is in it, but for our staging and what that does to the time of the top."""
    return {path: entry for path, entry in tree_of(replica).items() if path != '.' and not fr.STAGING.match(path)}


def test_a_source_that_is_gone_is_not_a_source_that_was_emptied(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    replica = far + '/src'
    fault_all_records(source)
    os.mkdir(far)
    with Running(tmp_path, '--mirror', source, far, 'bash') as running:
        before = fault_ours(replica)
        os.rename(source, source + '.away')
        running.says('is gone')
        running.cut()                   # a new connection does not change what that means
        running.says('connected again')
        assert fault_ours(replica) == before and running.process.poll() is None
        write(source + '.away/file', 'written while it was away')
        os.rename(source + '.away', source)
        until_equal(source, replica, running=running)
        write(source + '/file', 'watched again')
        until_equal(source, replica, running=running)
        os.rename(source, source + '.old')
        write(source + '/anew', 'made anew')
        until_equal(source, replica, running=running)
        write(source + '/anew', 'and watched')
        until_equal(source, replica, running=running)
        os.rename(source, source + '.old2')
        os.mkdir(source)                # empty, and not what it was: a mount that is to come
        until(lambda: running.err().count('is gone, or empty') >= 2, 20, running.log)
        assert os.path.exists(replica + '/anew')
        write(source + '/filled', 'then filled')
        until_equal(source, replica, running=running)


def test_a_source_exchanged_for_another_with_what_is_above_it_is_looked_at_anew_at_the_next_event(tmp_path):
    """No event tells of the exchange itself."""
    source, far = str(tmp_path / 'above' / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'old')
    write(source + '/other', 'old')
    os.mkdir(far)
    with Running(tmp_path, source, far, 'bash') as running:
        os.rename(str(tmp_path / 'above'), str(tmp_path / 'away'))
        write(source + '/file', 'of another')
        write(source + '/other', 'of another')
        write(str(tmp_path / 'away/src/file'), 'changed')
        until_equal(source, far + '/src', running=running)
        write(source + '/other', 'watched')
        until_equal(source, far + '/src', running=running)


def test_a_source_that_goes_away_before_it_is_sent_once_ends_that_with_status_1(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'data')
    done = once('--no-replicate-on-change', source, far, 'sh', '-c', 'mv "$0" "$0.away"; exec bash', source, expect=1,
                timeout=20)
    assert 'is gone' in done.stderr and 'in step' not in done.stdout


def test_an_unmounted_source_removes_nothing_and_is_taken_up_when_it_is_mounted_again(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    os.mkdir(far)
    with fault_tmpfs(source, 'size=4m'):
        write(source + '/file', 'data')
        write(source + '/d/file', 'data')
        running = Running(fault_open, source, far, 'bash')
    with running:
        running.says('is gone, or empty')
        assert open(far + '/src/d/file').read() == 'data'
        with fault_tmpfs(source, 'size=4m'):
            write(source + '/file', 'other data')
            until_equal(source, far + '/src', running=running)
            write(source + '/file', 'watched')
            until_equal(source, far + '/src', running=running)


def fault_comes_back_empty(source, far, running, later=False):
    """Has the source, a tmpfs with `file` in it, unmounted, in which no git must work, and another mounted there, which
    has the same numbers."""
    numbers = os.stat(source).st_dev, os.stat(source).st_ino
    subprocess.run(['umount', source], check=True)
    if later:
        running.says('is gone, or empty')
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'strictatime', 'none', source], check=True)
    assert (os.stat(source).st_dev, os.stat(source).st_ino) == numbers
    running.process.send_signal(signal.SIGCONT)
    for _ in range(2):
        looked = os.stat(source).st_atime_ns
        until(lambda: os.stat(source).st_atime_ns != looked, 20, running.log)
    running.says('is gone, or empty')
    assert open(far + '/src/file').read() == 'data'
    write(source + '/other', 'data')
    until_equal(source, far + '/src', running=running)


@pytest.mark.parametrize('later', [False, True])
def test_an_unmounted_source_that_comes_back_empty_was_not_emptied_though_its_numbers_are_the_same(later, fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    os.mkdir(far)
    with fault_tmpfs(source, 'size=4m'):        # at its end what is mounted by then goes
        write(source + '/file', 'data')
        with Running(fault_open, '--no-gitignore', source, far, 'bash') as running:
            fault_comes_back_empty(source, far, running, later)


def test_an_unmounted_source_comes_back_empty_behind_a_queue_of_events_that_ran_over(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    os.mkdir(far)
    with fault_tmpfs(source, 'size=4m'):
        write(source + '/file', 'data')
        for number in range(200):
            os.makedirs('%s/d%d/in' % (source, number))
        with kernel_setting(QUEUE, 16):
            running = Running(fault_open, '--no-gitignore', source, far, 'bash')
        with running:
            running.process.send_signal(signal.SIGSTOP)
            fault_comes_back_empty(source, far, running)
            assert 'lost events' in running.err()


@pytest.mark.parametrize('options', [(), ('--poll', '0.2')])
def test_an_empty_source_that_was_away_for_a_while_is_what_it_was(options, tmp_path):
    source, there = option_source(tmp_path, 'f')
    with option_watching(tmp_path, *options) as running:
        os.rename(str(source), str(tmp_path / 'away'))
        running.says('is gone, or empty')
        os.unlink(str(tmp_path / 'away' / 'f'))
        os.chmod(str(tmp_path / 'away'), 0o750)
        os.rename(str(tmp_path / 'away'), str(source))
        until_equal(str(source), str(there), running=running)


@fault_in_each_shell
def test_long_names_deep_directories_and_times_far_off_arrive(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(far)
    connect = shell_command(tmp_path, shell)

    def fill(top, first):
        deep = '/'.join([top] + ['%d' % i for i in range(100)])
        write(deep + '/bottom', first)
        for i, when in enumerate((-315619200, -1, 0, 1, 2**31, 4102444800, 10**9, int(time.time()) + 86400)):
            write('%s/times/%d' % (top, i), first, None, when * 10**9 + 500000000 * (i % 2))
            os.symlink('x', '%s/times/link%d' % (top, i))
            os.utime('%s/times/link%d' % (top, i), (when, when), follow_symlinks=False)
            os.makedirs('%s/times/d%d' % (top, i))
            os.utime('%s/times/d%d' % (top, i), (when, when))
        for name in ('n' * 255, 'ü' * 127 + 'x', b'\xff'.decode('utf-8', 'surrogateescape') * 255):
            write(os.path.join(top, name, name), first, 0o600)
        os.symlink('t' * 4000, top + '/long-target')
    whole = shell == 'busybox sh'       # its touch may know only seconds
    fill(source + '/a', 'together')
    with Running(tmp_path, source, far, *connect) as running:
        until_equal(source, far + '/src', 30, whole, running)
        fill(source + '/b', 'bit by bit')
        until_equal(source, far + '/src', 30, whole, running)
        write(source + '/a/times/0', 'newer bytes, older time', None, 10**18)   # a clock set back
        until_equal(source, far + '/src', 30, whole, running)
        os.utime(source + '/b/times/6', (5, 5))
        os.rename(source + '/a/0', source + '/up')
        shutil.rmtree(source + '/b')
        until_equal(source, far + '/src', 30, whole, running)
        assert not running.err()
    done = once('--no-replicate-on-change', source, far, *connect)
    assert done.stdout == 'in step\n'


@fault_in_each_shell
def test_thousands_of_files_removed_at_once_go_and_theirs_stay(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(far)
    for i in range(3000):
        write('%s/%d/%d' % (source, i % 30, i), '')
    with Running(tmp_path, source, far, *shell_command(tmp_path, shell)) as running:
        write(far + '/src/7/theirs', 'theirs')
        for i in range(30):
            shutil.rmtree('%s/%d' % (source, i))
        until(lambda: sorted(tree_of(far + '/src')) == ['.', '7', '7/theirs'], 30, running.log)
        until(lambda: re.search('file_replicator: 7: stays', running.err()))
        assert running.err().count('\n') == 1
        os.remove(far + '/src/7/theirs')
        write(source + '/7/again', 'made again')
        until(lambda: fault_holds(far, 'src/7/again', b'made again'))


def test_without_inotify_everything_is_looked_at_now_and_then(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    fault_all_records(source)
    os.mkdir(far)
    with Running(tmp_path, '--poll', '0.2', source, far, 'bash') as running:
        os.rename(source + '/many', source + '/renamed')
        write(source + '/big', FAULT_BIG[:1499999] + b'!')
        os.remove(source + '/link')
        until_equal(source, far + '/src', running=running)
        running.cut()
        write(source + '/more', 'more')
        until_equal(source, far + '/src', running=running)


# ---- limits

def test_lost_events_are_made_good(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(source)
    os.mkdir(far)
    with kernel_setting(QUEUE, 16):
        running = Running(tmp_path, source, far, 'dash')        # the limit is taken when inotify is opened
    with running:
        for round_number in range(3):
            for i in range(400):
                write('%s/%d/%d' % (source, i % 7, i), '%d' % round_number)
            os.rename(source + '/3', source + '/x%d' % round_number)
            shutil.rmtree(source + '/4')
        until_equal(source, far + '/src', running=running)
        assert 'inotify lost events' in running.err()


@pytest.mark.parametrize('setting, value, says', [
    ('max_inotify_watches', 5, 'fs.inotify.max_user_watches'),
    ('max_inotify_instances', 0, 'max_user_instances'),
])
def test_too_small_an_inotify_limit_is_named_and_polling_takes_over(tmp_path, monkeypatch, setting, value, says):
    """In a user namespace of its own, so that nobody else's limit changes."""
    if subprocess.run(['unshare', '-Ur', 'true'], stderr=subprocess.DEVNULL).returncode:
        pytest.skip('no user namespaces')
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for i in range(20):
        write('%s/%d/file' % (source, i), 'old')
    os.mkdir(far)
    fault_through(monkeypatch, tmp_path, 'unshare', '-Ur', 'sh', '-c',
                  'echo %d >/proc/sys/user/%s && exec "$0" "$@"' % (value, setting))
    with Running(tmp_path, source, far, 'bash') as running:
        running.says(says)
        for i in range(20):
            write('%s/%d/file' % (source, i), 'new %d' % i)
        write(source + '/made/later', 'new')
        until_equal(source, far + '/src', running=running)
        assert running.err().count(says) == 1


def test_few_file_descriptors_are_enough(tmp_path, monkeypatch):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    fault_all_records(source)
    for i in range(70):
        write('%s/large%d' % (source, i), FAULT_BIG[:1100000] + b'%d' % i)
    os.mkdir(far)
    fault_through(monkeypatch, tmp_path, 'sh', '-c', 'ulimit -n 64; exec "$0" "$@"')
    with Running(tmp_path, source, far, 'dash') as running:
        until_equal(source, far + '/src', running=running)
        for i in range(70):
            with open('%s/large%d' % (source, i), 'r+b') as file:
                file.write(b'changed')
        for _ in range(4):
            running.cut()
            running.says('connection lost')
        until_equal(source, far + '/src', 60, running=running)
        assert not re.search('[Tt]oo many open files', running.err())


def test_a_full_disk_under_the_log_file_or_the_output_stops_nothing(fault_open):
    tmp, source, far = fault_open, fault_open + '/src', fault_open + '/far'
    write(source + '/file', 'data')
    os.mkdir(far)
    with fault_tmpfs(tmp + '/log', 'size=16k'):
        with Running(tmp, '--log-file', tmp + '/log/log', source, far, 'bash') as running:
            fault_fill(tmp + '/log')
            for i in range(100):
                write('%s/%d/%d-%s' % (source, i, i, 'n' * 200), 'data')
            until_equal(source, far + '/src', running=running)
            running.says('log file')
            assert 'No space left' in running.err()
            assert running.stop() == 0
    with open('/dev/full', 'wb') as full:
        done = subprocess.run(command('--no-replicate-on-change', source, far, 'bash'), stdout=full, stderr=subprocess.PIPE,
                              timeout=30)
    assert b'Traceback' not in done.stderr and b'Exception' not in done.stderr, done.stderr.decode()
    assert done.stderr or not done.returncode
    done = once('--log-file', '/nonexistent/log', source, far, 'bash', expect=None)
    assert done.returncode in (1, 2) and '/nonexistent/log' in done.stderr


# ---- stopping

def fault_stop(running, number, replica, whole):
    """Stops it, and looks at what it left: nothing running, nothing staged, no part of a file."""
    at = time.monotonic()
    running.process.send_signal(number)
    status = running.process.wait(10)
    took = time.monotonic() - at
    assert took < FAULT_STOP_SECONDS, took
    assert status == (-9 if number == signal.SIGKILL else 0), (status, running.log())
    fault_nothing_left(replica)
    for kind, mode, mtime, data in tree_of(replica).values() if os.path.isdir(replica) else ():
        assert kind != stat.S_IFREG or data in whole
    assert 'Traceback' not in running.err()


def test_asked_to_end_again_while_it_ends_it_still_leaves_nothing(tmp_path):
    """Who presses Ctrl-C once often presses it twice."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(far)
    write(source + '/file', 'data')
    reluctant = ['sh', '-c', "trap '' INT TERM HUP; dash; echo $$ >%s/clung; while :; do sleep 0.01; done" % tmp_path]
    with Running(tmp_path, source, far, *reluctant) as running:
        running.process.send_signal(signal.SIGINT)
        until(lambda: (tmp_path / 'clung').exists() and (tmp_path / 'clung').read_text())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            running.process.send_signal(number)
        assert running.process.wait(5) == 0
        assert not os.path.exists('/proc/' + (tmp_path / 'clung').read_text().strip()) and running.err() == ''
        assert os.listdir(far + '/src') == ['file']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize('when', ['idle', 'in a large file', 'in a slow large file', 'in a bulk', 'without a far side',
                                  'while it starts', 'in a remote hook', 'when it is stopped'])
def test_a_signal_ends_all_at_once_and_leaves_nothing(tmp_path, number, when):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(far)
    write(source + '/file', 'data')
    slow = {'in a slow large file': 0.2}.get(when)
    connect, options = ['dash'], []
    if slow or when == 'in a large file':
        connect, controls = fault_relay(tmp_path, 'dash', slow=slow or 0.002)
    if when == 'without a far side':
        connect, options = ['false'], ['--wait']
    if when == 'while it starts':
        connect = ['sh', '-c', 'sleep 1000']
    if when == 'in a remote hook':
        options = ['--remote-hook', 'touch ../hooked; sleep 1000; true %s/src' % far]
    if when == 'in a bulk':
        for i in range(4000):
            write('%s/%d/%d' % (source, i % 40, i), '%d' % i * 50)
        whole = {data for kind, *_, data in tree_of(source).values() if kind == stat.S_IFREG}
    else:
        whole = {b'data', FAULT_BIG}
    with Running(tmp_path, *options, source, far, *connect, wait=when in ('idle', 'when it is stopped')) as running:
        if 'large' in when:
            until(lambda: fault_staging(far) or os.path.isfile(far + '/src/file'))
            write(source + '/big', FAULT_BIG)
            until(lambda: any(os.path.getsize(os.path.join(d, name)) for path in fault_staging(far)
                              for d, _, names in os.walk(path) for name in names if name.startswith('part')))
        elif when == 'in a bulk':
            until(lambda: os.path.isdir(far + '/src') and len(os.listdir(far + '/src')) > 1)
        elif when == 'without a far side':
            running.says('waiting for the far side')
        elif when == 'while it starts':
            until(lambda: fault_children(running))
        elif when == 'in a remote hook':
            until(lambda: os.path.exists(far + '/hooked'))
        elif when == 'when it is stopped':
            for pid in running.connections():
                os.kill(pid, signal.SIGSTOP)
            write(source + '/file', 'data')
        if when == 'when it is stopped' and number == signal.SIGKILL:
            pids = running.connections()            # nobody is left who could end what is stopped
            running.process.kill()
            running.process.wait()
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            fault_nothing_left(far)
        elif when in ('in a remote hook', 'while it starts', 'in a slow large file') and number == signal.SIGKILL:
            connections = running.connections()
            running.process.kill()
            running.process.wait()
            for pid in connections:                 # nor one that sleeps and does not listen, or is still to be told, or is still to be told
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        else:
            fault_stop(running, number, far + '/src', whole)
    if 'large' in when and number == signal.SIGKILL:
        once('--no-replicate-on-change', source, far, 'dash')
        assert not difference(source, far + '/src')


def test_what_a_connection_command_left_running_is_ended_and_not_waited_for(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'data')
    os.mkdir(far)
    words = command('--no-replicate-on-change', source, far, 'sh', '-c', 'trap "" TERM; (sleep 1000; : %s) & exec bash' % far)

    def seconds_to_end():
        with subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True) as process:
            until(lambda: process.stdout.readline() in (b'in step\n', b''))
            began = time.monotonic()
            assert process.wait(20) == 0
            took = time.monotonic() - began
        fault_nothing_left(far)
        return took
    assert min(seconds_to_end() for _ in range(3)) < 0.5


def fault_children(running):
    with contextlib.suppress(OSError):
        return running.connections()


def test_killed_at_any_moment_it_leaves_whole_files_and_the_next_start_mends_all(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    replica = far + '/src'
    fault_all_records(source)
    whole = {data for kind, *_, data in tree_of(source).values() if kind == stat.S_IFREG}
    os.mkdir(far)
    dice = random.Random(3)
    for turn in range(14):
        number = signal.SIGKILL if turn % 2 else signal.SIGTERM
        with Running(tmp_path, '--mirror', source, far, 'dash', wait=False) as running:
            end = time.monotonic() + dice.uniform(0.05, 0.6)
            while time.monotonic() < end:
                write(source + '/file', '%d' % turn)
                data = FAULT_BIG[:dice.randrange(1 << 20, 6 << 20)]
                whole.update((b'%d' % turn, b'', data))
                write(source + '/big', data)
                for i in range(50):
                    write('%s/bulk/%d' % (source, i), '%d' % turn)
            at = time.monotonic()
            running.process.send_signal(number)
            running.process.wait(10)
            assert time.monotonic() - at < FAULT_STOP_SECONDS, turn
            until(lambda: not fault_processes(replica), 3, lambda: fault_processes(replica))
            for path, (kind, mode, mtime, data) in (tree_of(replica) if os.path.isdir(replica) else {}).items():
                hidden = any(fr.STAGING.fullmatch(part) for part in path.split('/'))
                assert kind != stat.S_IFREG or hidden and number == signal.SIGKILL or data in whole or len(data) < 3 << 20
    once('--mirror', '--no-replicate-on-change', source, far, 'dash')
    assert not difference(source, replica)


# ---- hostile names and contents

FAULT_WORDS = [
    '-rf', '--', '-', '-n', '-e', '=', '!', '#', '~', '*', '?', '[a]', '[!a]*', '{a,b}', '$HOME', '$(touch pwned)', '`touch pwned`',
    '"', "'", "'; touch pwned; '", '"; touch pwned; "', '\\', '\\n', '\\c', '\\0', '\\\\', '%s%n', '%', ' ', '  two', 'end ', '\t',
    '\n', '\n\n', 'a\n', '\na', 'a\n\nb', 'a\nb\n', '\r', 'a\r\n', '\x7f', '\x1b[31m', '\x01', '...', '..a', '. ', '.a\n', '&', '|', ';', '<',
    '>', '(', ')', 'file 1 1 077 - 0 -', 'beat 1 0 ', 'clean 1 0', '0', '5', 'ready', 'listed', '+ tar+ fine sha256sum 1', 'NONCE.', 'EOF',
    'b', 's', 'p', 'x', 'part1', 'hook', 'main', 'leave', '.file_replicator', '.file_replicator.', '.file_replicator.0123456789a',
    '.file_replicator.0123456789ab.txt', 'ü', '€', '\udcff', '\udcc3', 'a\udc80b', 'x' * 255, "'" * 200, '\n' * 200, '%' * 250, '\\' * 250,
    'con', 'a:b', '!!', '^', 'nul\x02', '😀', '.gitignore ', '@', '@1', ',', '//'.replace('/', '|'), '*.*', 'a b c\td']


def fault_hostile(top):
    for name in FAULT_WORDS + [os.fsdecode(bytes([b])) for b in range(1, 256) if b not in b'/.'] \
            + [os.fsdecode(b'a%cz' % b) for b in range(1, 256) if b not in b'/']:
        write(os.path.join(top, 'files', name), os.fsencode(name))
    for name in FAULT_WORDS:
        write(os.path.join(top, 'dirs', name, name), os.fsencode(name) + b'\n')
        os.makedirs(os.path.join(top, 'links'), exist_ok=True)
        os.symlink(name, os.path.join(top, 'links', name))
        os.makedirs(os.path.join(top, 'empty', name))
    every = bytes(range(256))
    for i, data in enumerate((every, every * 300, b'\0' * 3000, b'-n', b'\\c', b'%s', b"'", b'\n', b'no end', b'0123456789ab.\n' * 9,
                              b'file 1 1 077 - 0 -\n./x\n3\nabc', b'\r\n', every[::-1] * 5000)):
        write('%s/contents/%d' % (top, i), data)


@fault_in_each_shell
def test_hostile_names_and_contents_arrive_and_nothing_in_them_is_run(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(far)
    fault_hostile(source + '/at first')
    with Running(tmp_path, '--no-gitignore', source, far, *shell_command(tmp_path, shell), cwd=str(tmp_path)) as running:
        until_equal(source, far + '/src', running=running)
        for name in FAULT_WORDS:                # one by one
            write(os.path.join(source, name), 'alone', 0o600)
        until_equal(source, far + '/src', running=running)
        for name in FAULT_WORDS:
            os.rename(os.path.join(source, name), os.path.join(source, 'at first', name))
            os.chmod(os.path.join(source, 'at first/files', name), 0o751)
            os.rename(os.path.join(source, 'at first/dirs', name), os.path.join(source, name))
        until_equal(source, far + '/src', running=running)
        shutil.rmtree(source + '/at first')
        until_equal(source, far + '/src', running=running)
        running.cut()
        for name in FAULT_WORDS:
            shutil.rmtree(os.path.join(source, name))
        until_equal(source, far + '/src', running=running)
        assert all(line.startswith('file_replicator: conn') for line in running.err().splitlines())
        shown = running.out() + running.err()
        assert not re.search(r'[\x00-\x09\x0b-\x1f\x7f]', shown), 'a name reaches the terminal as it is'
    assert not [d for d, _, names in os.walk(str(tmp_path)) if 'pwned' in names] and not os.path.exists('pwned')


@pytest.mark.parametrize('shell', ['bash', 'dash'])
def test_hostile_names_and_contents_arrive_without_tar(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(far)
    fault_hostile(source)
    connect = shell_command(tmp_path, shell)
    fault_command(tmp_path / ('shims-' + shell), 'tar', '#!/bin/sh\nexit 1\n')
    once('--no-gitignore', '--no-replicate-on-change', source, far, *connect)
    assert not difference(source, far + '/src')


@pytest.mark.parametrize('kind, what', [('bash', 'tar'), ('bash, no tar', 'script'), ('busybox sh, no tar', 'script'),
                                        ('chroot of busybox', 'tar'), ('chroot of busybox, no tar', 'script'),
                                        ('chroot of busybox, no link', 'tar')])
def test_many_files_travel_as_an_archive_wherever_there_is_a_tar(request, tmp_path, kind, what):
    far = make_far_side(kind.replace(', no link', ''), request, tmp_path)
    if 'no link' in kind:
        os.unlink(str(tmp_path / 'there/bin/tar'))
    source = str(tmp_path / 'src')
    for number in range(9):
        write('%s/%d' % (source, number), mtime_ns=10**18)
    write(source + '/new/large', bytes(100000), mtime_ns=10**18)
    for path in (source, source + '/new'):
        os.utime(path, ns=(10**18, 10**18))     # which any touch can set
    done = once('--no-replicate-on-change', '--debugging', source, far.parent, *far.words)
    assert not difference(source, far.seen + '/src')
    assert set(re.findall(r'record bulk \d+ \d+ (\w+)', done.stderr)) == {what}
    # a shell takes longer to read it as a line than dd needs to start
    assert len(re.findall(r'record file .*new/large', done.stderr)) == (what == 'script')


def test_names_that_our_staging_has_are_left_out_with_a_notice(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(far)
    names = ['.file_replicator.0123456789ab', '.file_replicator.0123456789ab-new']
    for name in names:
        write(os.path.join(source, name), 'data')
        write(os.path.join(source, 'd', name, 'in'), 'data')
    write(source + '/fine', 'data')
    done = once('--no-replicate-on-change', source, far, 'bash')
    assert sorted(tree_of(far + '/src')) == ['.', 'd', 'fine'] and done.stderr.count('is left out') == 4


@fault_in_each_shell
def test_what_a_killed_run_left_staged_over_there_goes_at_the_next_start_and_no_more(tmp_path, shell):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    victim, before = fault_victim(tmp_path)
    write(source + '/file', 'data')
    for at in ('', 'd/'):
        write(source + '/' + at + 'kept', 'data')
        write(far + '/src/' + at + '.file_replicator.0123456789ab-new', 'half a f')
    write(far + '/src/.file_replicator.0123456789ab/b/1/f', 'half a f')
    os.symlink(victim, far + '/src/.file_replicator.ba9876543210')
    write(far + '/src/.file_replicator.0123456789abc', 'theirs')
    os.mkdir(far + '/src/d/.file_replicator.0123456789ab')       # theirs: a staging stands in the root only
    os.mkdir(far + '/src/.file_replicator.made_by_hand')
    once('--no-replicate-on-change', source, far, *shell_command(tmp_path, shell))
    assert sorted(tree_of(far + '/src')) == ['.', '.file_replicator.0123456789abc', '.file_replicator.made_by_hand', 'd',
                                             'd/.file_replicator.0123456789ab', 'd/kept', 'file', 'kept']
    assert tree_of(victim) == before


# ---- mirror and clean-out

def test_a_replica_that_is_its_source_by_another_path_is_refused(fault_open):
    write(fault_open + '/p/x/file', 'precious')
    os.mkdir(fault_open + '/q')
    with fault_mount(fault_open + '/q', '--bind', fault_open + '/p'):
        done = once('--mirror', fault_open + '/p/x', fault_open + '/q', 'bash', expect=1, timeout=20)
    assert 'choose another destination' in done.stderr and fault_holds(fault_open, 'p/x/file', b'precious')
    assert os.listdir(fault_open + '/p/x') == ['file']


def test_a_directory_that_stands_twice_in_the_source_is_followed_at_both_places(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    write(source + '/d/e/f', 'at first')
    os.makedirs(source + '/same')
    with fault_mount(source + '/same', '--bind', source + '/d'):
        with Running(fault_open, source, far, 'bash') as running:
            running.says('d and same are one directory')
            for name in 'd', 'same', 'd/e', 'same/e':
                write('%s/%s/%s' % (source, name, name.replace('/', '-')), name)
                until_equal(source, far + '/src', 10, running=running)


def fault_receiver(root, flags, **env):
    """What the receiver says to a root and flags, without a record."""
    done = subprocess.run(['sh', '-c', session_text(root, flags)], stdin=subprocess.DEVNULL, cwd='/',
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ, **env))
    return done.stdout.decode()


@pytest.mark.parametrize('root', ['/', '//', '/.', '/usr/..', ''])
def test_a_clean_out_of_everything_or_nothing_is_refused(root):
    said = fault_receiver(root, 'gd-') if root else fault_receiver(root, 'g-')
    assert 'stop' in said and 'ready' not in said, said


@pytest.mark.parametrize('flag', [['--mirror'], ['--clean-out-first'], ['--mirror', '--dry-run']], ids=' '.join)
@pytest.mark.parametrize('home', ['far/src', 'far/src/', 'far/src/me', 'link/src', 'link/src/me', 'far/./src//me'])
def test_a_mirror_or_clean_out_of_the_home_directory_over_there_is_refused(tmp_path, flag, home):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'data')
    write(far + '/src/me/precious', 'precious')
    os.symlink('far', str(tmp_path / 'link'))           # as where /home is a link to /usr/home
    before = tree_of(far)
    done = once(*flag, '--no-replicate-on-change', source, far, 'env', 'HOME=%s/%s' % (tmp_path, home), 'bash', expect=1)
    assert 'home' in done.stderr and tree_of(far) == before


def test_a_dry_run_changes_nothing_and_counts_what_would_be_removed(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/file', 'data')
    for i in range(7):
        write('%s/src/d/%d' % (far, i), 'there')
    before = tree_of(far)
    done = once('--mirror', '--dry-run', source, far, 'bash')
    assert done.stdout.count('would remove') == 8 and tree_of(far) == before
    done = once('--clean-out-first', '--dry-run', source, far, 'bash')
    assert re.search(r'would (remove|empty)[^\n]*\b8\b', done.stdout) or done.stdout.count('would remove') == 8, done.stdout
    assert tree_of(far) == before


def test_without_proc_another_file_system_is_known_by_its_number(fault_open):
    """Nothing in it is removed, and nothing is renamed into it from elsewhere: that would be no rename."""
    source, root = fault_open + '/src', busybox_root(fault_open + '/root')
    for number in range(5):
        write('%s/mounted/%d' % (source, number))
    os.makedirs(root + '/srv/src/mounted')
    os.makedirs(root + '/srv/src/other')
    with fault_tmpfs(root + '/srv/src/mounted', 'size=1m'), fault_tmpfs(root + '/srv/src/other', 'size=1m'):
        write(root + '/srv/src/other/file', 'stays')
        done = once('--mirror', '--no-replicate-on-change', '--debugging', source, '/srv', need('chroot'), root, '/bin/sh',
                    expect=None)
        assert fault_holds(root + '/srv', 'src/other/file', b'stays')
        assert len(os.listdir(root + '/srv/src/mounted')) == 5 and 'record bulk' not in done.stderr


@fault_in_each_shell
@pytest.mark.parametrize('flag', ['--mirror', '--clean-out-first'])
def test_removing_never_crosses_a_link_or_a_mount_point(fault_open, shell, flag):
    """Neither another file system nor, bound to a place in the replica, a directory of the same one."""
    tmp, source, replica = fault_open, fault_open + '/src', fault_open + '/far/src'
    victim, before = fault_victim(tmp)
    write(source + '/file', 'data')
    write(source + '/kept/file', 'data')
    write(replica + '/extra/file', 'goes')
    for name in ('bound', 'deep/bound', 'mounted'):
        os.makedirs(os.path.join(replica, name))
    os.symlink(victim, replica + '/link')
    os.symlink(victim, replica + '/extra/link')
    with fault_tmpfs(replica + '/mounted', 'size=1m'), fault_mount(replica + '/bound', '--bind', victim), \
            fault_mount(replica + '/deep/bound', '--bind', victim):
        write(replica + '/mounted/d/file', 'stays')
        once(flag, '--no-replicate-on-change', source, tmp + '/far', *shell_command(tmp, shell), expect=None)
        assert open(replica + '/mounted/d/file').read() == 'stays'
        assert tree_of(victim) == before
        assert not os.path.lexists(replica + '/link') and not os.path.lexists(replica + '/extra')
        assert open(replica + '/kept/file').read() == 'data'


# ==== What is left out, what is done after, and what is seen ===============================================
#
# git is the oracle for --gitignore. Hundreds of random trees are looked at in this process, by the program's
# own LeftOut and Source with a real inotify and a real git; a dozen go through the whole program.

GIT_NAMES = ['a', 'b', 'c d', 'build', 'x.log', 'y.o', 'doc', 'é', 'x.txt', '-n', '[z]', '!q', 'Makefile']
GIT_PATTERNS = ['*.log', '*.o', 'build/', 'build', '!x.log', '!build/', '/a', 'a', 'a/b', '**/b', 'b/',
                'doc/**', 'a/*', '!a/b', '[ab]', '*', '!*/', '!*.txt', 'c d', '\\!q', '# none', '', 'doc/*.o',
                'a/**/x.log', '[[]z]', '-n', '?', 'é', '!/doc', '/*/b', 'x.*', '!y.o', 'build/*',
                '!build/x.log', 'build/**/a', '*.txt   ', 'M?k*e']


def git(top, *words, check=True, **environment):
    """Runs git; no configuration of this computer's user is seen."""
    need('git')
    env = dict({k: v for k, v in os.environ.items() if not k.startswith('GIT_') or k == 'GIT_CONFIG_GLOBAL'},
               GIT_AUTHOR_NAME='t', GIT_AUTHOR_EMAIL='t@t', GIT_COMMITTER_NAME='t', GIT_COMMITTER_EMAIL='t@t',
               **environment)
    done = subprocess.run(['git', '-c', 'protocol.file.allow=always', '-C', str(top), *map(str, words)],
                          env=env,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert not check or not done.returncode, done.stderr
    return done.stdout


def git_init(top):
    os.makedirs(str(top), exist_ok=True)
    git(top, 'init', '-q', '--template=')
    os.makedirs(os.path.join(str(top), '.git', 'info'), exist_ok=True)


def git_all_paths(top):
    """All paths below a directory but those of repositories' own."""
    directories, files = set(), set()
    for at, names, others in os.walk(top):
        names[:] = [name for name in names if name != '.git']
        below = os.path.relpath(at, top) + '/' if at != top else ''
        directories.update(below + name for name in names if not os.path.islink(os.path.join(at, name)))
        files.update(below + name for name in others + names if below + name not in directories
                     and name != '.git')
    return directories, files


def git_oracle(top, repository=True):
    """What git says belongs to a directory: the files it lists, and of the directories (git lists none) those
    that hold such a file (or did: the index still has it), and those that no pattern ignores: an empty one
    too, and one that holds ignored files only."""
    elsewhere = {} if repository else {'GIT_DIR': str(top) + '.oracle', 'GIT_WORK_TREE': str(top)}
    if elsewhere and not os.path.isdir(elsewhere['GIT_DIR']):
        git('/', 'init', '-q', '--template=', '--bare', elsewhere['GIT_DIR'])
        git('/', 'config', '-f', elsewhere['GIT_DIR'] + '/config', 'core.bare', 'false')
    directories, files = git_all_paths(top)
    listed = git(top, 'ls-files', '-co', '--exclude-standard', '-z', **elsewhere)
    listed = {os.fsdecode(path) for path in listed.split(b'\0')}
    ignored = subprocess.run(['git', '-C', top, 'check-ignore', '--no-index', '-z', '--stdin'],
                             stdout=subprocess.PIPE,
                             input=b''.join(os.fsencode(path) + b'\0' for path in directories),
                             env=dict(os.environ, **elsewhere)).stdout
    wanted = directories - {os.fsdecode(path) for path in ignored.split(b'\0')}
    above = {path[:at.start()] for path in listed for at in re.finditer('/', path)}
    return listed & files | above & directories | wanted


def git_some_patterns(chance):
    return '\n'.join(chance.choice(GIT_PATTERNS) for _ in range(chance.randint(1, 4))) + '\n'


def git_grow(top, chance, depth=0):
    """A random tree, small in names so that patterns meet them."""
    for name in chance.sample(GIT_NAMES, chance.randint(1, 5)):
        path = os.path.join(top, name)
        if os.path.lexists(path):
            continue
        if depth < 3 and chance.random() < 0.45:
            os.mkdir(path)
            if chance.random() < 0.85:
                git_grow(path, chance, depth + 1)
        elif chance.random() < 0.1:
            os.symlink(chance.choice(GIT_NAMES), path)
        else:
            write(path, name)
    if chance.random() < (0.8 if not depth else 0.25):
        write(os.path.join(top, '.gitignore'), git_some_patterns(chance))


def git_track_some(top, chance):
    files = sorted(git_all_paths(top)[1])
    if files:
        git(top, 'add', '-f', '--',
            *(':(literal)' + path for path in chance.sample(files, min(len(files), chance.randint(1, 3)))))


def git_looked_at(top, watched=False, excludes=()):
    """(Source, what it has looked at), as the program does it."""
    options = fr.parse(['--quiet', top, '/nowhere', 'true'])
    report = fr.Report(options)
    source = fr.Source(top, fr.LeftOut(top, excludes, True), fr.Watch(watched), report)
    source.hint('', fr.CONTENT)
    return source, git_seen(source)


def git_seen(source):
    for _ in range(8):
        source.listen()
        for path in list(source.later):
            source.hint(path, source.later[path][2])
        if not source.hints and not source.rules_changed:
            break
        source.look()
    return set(source.tree.below(''))


def git_close(source):
    source.left_out.close()
    if source.watch.fd is not None:
        source.watch.give_up('the end')


def git_random(base, seed, kind):
    """A random tree of a kind in a new directory: what to replicate, and whether git knows it."""
    chance = random.Random('%s %s' % (kind, seed))
    top = os.path.join(str(base), '%s%d' % (kind.replace(' ', ''), seed))
    os.mkdir(top)
    if kind == 'linked work tree':
        git_init(top + '.main')
        git(top + '.main', 'commit', '-q', '--allow-empty', '-m', 'x')
        git(top + '.main', 'worktree', 'add', '-q', top, '--detach')
    elif kind != 'no repository':
        git_init(top)
    git_grow(top, chance)
    repository = kind != 'no repository'
    if repository:
        if chance.random() < 0.4:
            git_track_some(top, chance)
        if chance.random() < 0.3:
            write(os.path.join(top + '.main' if kind == 'linked work tree' else top, '.git/info/exclude'),
                  git_some_patterns(chance))
    source = top
    if kind == 'subdirectory':
        source = os.path.join(top, 'a')
        if not os.path.isdir(source) or os.path.islink(source):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(source)
            os.mkdir(source)
        git_grow(source, chance)
    return source, repository, chance


def git_global(monkeypatch, tmp_path, patterns):
    write(str(tmp_path / 'global-ignore'), patterns)
    write(str(tmp_path / 'gitconfig'), '[core]\n\texcludesFile = %s\n' % (tmp_path / 'global-ignore'))
    monkeypatch.setenv('GIT_CONFIG_GLOBAL', str(tmp_path / 'gitconfig'))


def git_ignores_itself(source):
    return subprocess.run(['git', '-C', source, 'check-ignore', '-q', '.']).returncode == 0


@pytest.mark.parametrize('kind, count', [('work tree', 90), ('subdirectory', 60), ('no repository', 60),
                                         ('linked work tree', 25)])
def test_what_is_replicated_is_what_git_lists_in_any_tree(tmp_path, monkeypatch, kind, count):
    git_global(monkeypatch, tmp_path, 'Makefile\n')
    wrong = []
    for seed in range(count):
        top, repository, _ = git_random(tmp_path, seed, kind)
        if kind == 'subdirectory' and git_ignores_itself(top):
            with pytest.raises(fr.Stop, match='ignores all'):
                git_looked_at(top)
            continue
        wanted = git_oracle(top, repository)
        source, seen = git_looked_at(top)
        git_close(source)
        if seen != wanted:
            wrong.append((seed, 'missing', sorted(wanted - seen), 'too many', sorted(seen - wanted)))
    assert not wrong, (len(wrong), wrong[:3])


def git_change(top, chance, repository):
    """One random thing that people do in a work tree."""
    directories, files = map(sorted, git_all_paths(top))
    somewhere = chance.choice(directories + [''])
    path = os.path.join(top, somewhere, chance.choice(GIT_NAMES))
    what = chance.choice(['write', 'write', 'grow', 'remove', 'move', 'move', 'rules', 'no rules', 'track',
                          'untrack'])
    if what == 'write' and not os.path.lexists(path):
        write(path, b'new')
    elif what == 'grow' and not os.path.lexists(path):
        os.mkdir(path)
        git_grow(path, chance, 2)
    elif what == 'remove' and files:
        os.unlink(os.path.join(top, chance.choice(files)))
    elif what == 'move' and directories:
        old = os.path.join(top, chance.choice(directories))
        if not os.path.lexists(path) and not path.startswith(old + '/'):
            os.rename(old, path)
    elif what == 'rules':
        write(os.path.join(top, somewhere, '.gitignore'), git_some_patterns(chance))
    elif what == 'no rules':
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(top, somewhere, '.gitignore'))
    elif what == 'track' and files and repository:
        git(top, 'add', '-f', '--', ':(literal)' + chance.choice(files))
    elif what == 'untrack' and repository:
        git(top, 'rm', '-rq', '--cached', '--ignore-unmatch', '-f', '--', '.')
    return what, os.path.relpath(path, top)


@pytest.mark.parametrize('kind, count', [('work tree', 40), ('no repository', 25)])
def test_what_changes_under_watch_is_decided_as_git_would_from_scratch(tmp_path, kind, count):
    wrong = []
    for seed in range(count):
        top, repository, chance = git_random(tmp_path, 1000 + seed, kind)
        source, _ = git_looked_at(top, watched=True)
        done = []
        for _ in range(6):
            done = done[-2:] + [git_change(top, chance, repository) for _ in range(chance.randint(1, 2))]
            seen, wanted = git_seen(source), git_oracle(top, repository)
            if seen != wanted:
                wrong.append((seed, done, 'missing', sorted(wanted - seen), 'too many',
                              sorted(seen - wanted)))
                break
        git_close(source)
    assert not wrong, (len(wrong), wrong[:4])


def option_paths(root):
    """All paths below a directory, sorted: what is there, without how it is, and without our staging."""
    return sorted(path for path in tree_of(str(root)) if path != '.' and not fr.STAGING.match(path))


def option_source(tmp_path, *paths):
    """A source `src` with these files, which hold their own path (one that ends in / is a directory), and
    where the replica will be."""
    source, there = tmp_path / 'src', tmp_path / 'there'
    there.mkdir(exist_ok=True)
    source.mkdir(exist_ok=True)
    for path in paths:
        if path.endswith('/'):
            os.makedirs(str(source / path), exist_ok=True)
        else:
            write(str(source / path), os.fsencode(path))
    return source, there / 'src'


def option_age(root):
    """Gives all files an old time: what changed just now is sent again at a start, whatever its time says."""
    for path in git_all_paths(str(root))[1]:
        os.utime(os.path.join(str(root), path), ns=(1, 1600000000 * 10**9 + 123456789))


OPTION_FARS = ['bash', 'busybox only']


def option_far(tmp_path, far='bash'):
    """Connection command, DEST_PARENT_DIR as the far side sees it, and the directory that is here."""
    if far != 'busybox only':           # 'dash' has GNU's tools, where bash changes to a busybox if there is one
        words = ['bash'] if far == 'bash' else shell_command(tmp_path, far)
        return words, str(tmp_path / 'there'), str(tmp_path / 'there')
    if os.getuid():
        pytest.skip('a chroot needs root')
    root = busybox_root(str(tmp_path / 'root'))
    return [need('chroot'), root, '/bin/sh'], '/srv', os.path.join(root, 'srv')


def option_once(tmp_path, *options, far='bash', **more):
    """Replicates tmp_path/src once; returns the CompletedProcess."""
    command_words, parent, _ = option_far(tmp_path, far)
    return once('--no-replicate-on-change', *options, tmp_path / 'src', parent, *command_words, **more)


def option_watching(tmp_path, *options, far='bash', **more):
    command_words, parent, _ = option_far(tmp_path, far)
    return Running(tmp_path, *options, tmp_path / 'src', parent, *command_words, **more)


def option_replica(tmp_path, far='bash'):
    return os.path.join(option_far(tmp_path, far)[2], 'src')


def option_lines(text, *verbs):
    """The paths of the lines that begin with one of these verbs."""
    found = (re.match(r'(\w+) (.*?)/?(?: \([^)]*ms\))?$', line) for line in text.splitlines())
    return [each.group(2) for each in found if each and each.group(1) in verbs]


def option_has(root, *paths):
    return all(os.path.lexists(os.path.join(str(root), path)) for path in paths)


# ---- --gitignore, through the whole program

@pytest.mark.parametrize('far', OPTION_FARS)
@pytest.mark.parametrize('seed, kind', [(5, 'work tree'), (6, 'subdirectory'), (7, 'no repository'),
                                        (8, 'linked work tree'),
                                        (9, 'work tree'), (10, 'no repository')])
def test_the_replica_holds_what_git_lists(tmp_path, seed, kind, far):
    top, repository, _ = git_random(tmp_path, seed, kind)
    if not git_oracle(top, repository):
        write(os.path.join(top, 'a.txt'))
    os.symlink(top, str(tmp_path / 'src'))
    option_once(tmp_path, far=far)
    assert set(option_paths(option_replica(tmp_path, far))) == git_oracle(top, repository)


def test_nothing_is_left_out_with_no_gitignore(tmp_path):
    source, there = option_source(tmp_path, 'a.log', 'build/b', '.gitignore')
    write(str(source / '.gitignore'), '*.log\nbuild/\n')
    git_init(source)
    option_once(tmp_path, '--no-gitignore')
    assert not difference(str(source), str(there))


def test_a_directory_that_holds_only_ignored_files_is_replicated_and_what_comes_into_it_arrives(tmp_path):
    source, there = option_source(tmp_path, 'logs/a.log', 'logs/old/b.log', 'empty/', 'build/c')
    write(str(source / '.gitignore'), '*.log\nbuild/\n')
    git_init(source)
    with option_watching(tmp_path):
        assert option_paths(there) == ['.gitignore', 'empty', 'logs', 'logs/old']
        write(str(source / 'logs/old/new.txt'), 'new')
        until(lambda: option_has(there, 'logs/old/new.txt'), 5)


def test_a_subdirectory_that_holds_only_ignored_files_is_no_error(tmp_path):
    source, there = option_source(tmp_path, 'a.log')
    git_init(tmp_path)
    write(str(tmp_path / '.gitignore'), '*.log\n')
    option_once(tmp_path)
    assert option_paths(there) == []


def test_a_source_that_git_ignores_altogether_is_an_error_that_names_the_way_out(tmp_path):
    option_source(tmp_path, 'a')
    git_init(tmp_path)
    write(str(tmp_path / '.gitignore'), 'src/\n')
    assert '--no-gitignore' in option_once(tmp_path, expect=1).stderr
    option_once(tmp_path, '--no-gitignore')


@pytest.mark.parametrize('repository', [True, False])
def test_a_changed_gitignore_is_taken_up_while_watching(tmp_path, repository):
    source, there = option_source(tmp_path, 'a.log', 'b.o', 'out/c', 'deep/er/d.log', 'deep/er/e.tmp')
    write(str(source / '.gitignore'), '*.log\nout/\n')
    if repository:
        git_init(source)
    with option_watching(tmp_path) as running:
        assert option_paths(there) == ['.gitignore', 'b.o', 'deep', 'deep/er', 'deep/er/e.tmp']
        write(str(source / '.gitignore'), '*.o\n')
        until(lambda: option_has(there, 'a.log', 'out/c', 'deep/er/d.log'), 5, running.log)
        write(str(source / 'b.o'), 'now ignored')
        write(str(source / 'out/c'), 'now watched')
        until(lambda: (there / 'out/c').read_bytes() == b'now watched', 5)
        assert (there / 'b.o').read_bytes() == b'b.o'         # it stays as it was, untouched
        os.unlink(str(source / 'b.o'))
        write(str(source / 'deep/er/.gitignore'), 'e.tmp\n')   # nested, and new
        until(lambda: option_has(there, 'deep/er/.gitignore'), 5)
        os.unlink(str(source / 'deep/er/e.tmp'))
        write(str(source / 'g.o'))
        write(str(source / 'behind it'))
        until(lambda: option_has(there, 'behind it'), 5)
        assert not option_has(there, 'g.o')
        os.unlink(str(source / '.gitignore'))
        write(str(source / 'f.o'))
        until(lambda: option_has(there, 'f.o', 'g.o') and not option_has(there, '.gitignore'), 5)
        assert option_has(there, 'b.o', 'deep/er/e.tmp')


@pytest.mark.parametrize('far', OPTION_FARS)
@pytest.mark.parametrize('repository', [True, False])
def test_what_git_would_ignore_is_never_removed_though_it_stands_only_there(tmp_path, repository, far):
    source, _ = option_source(tmp_path, 'a', 'd/b')
    write(str(source / '.gitignore'), '*.log\nbuild/\n/top\n!keep.log\n')
    write(str(source / 'd/.gitignore'), 'c.tmp\n')
    if repository:
        git_init(source)
    there = option_replica(tmp_path, far)
    stay = ['x.log', 'd/y.log', 'build/out/z', 'e/build/z', 'top', 'd/c.tmp', 'new/x.log']
    for name in [*stay, 'd/other', 'extra/f', 'keep.log', 'c.tmp', 'd/top']:
        write(os.path.join(there, name), 'theirs')
    os.mkdir(os.path.join(there, 'd/build'))
    option_once(tmp_path, '--mirror', far=far)
    assert os.path.isdir(os.path.join(there, 'd/build'))
    assert [path for path in option_paths(there) if os.path.isfile(os.path.join(there, path))] == sorted(
        [*stay, 'a', 'd/b', '.gitignore', 'd/.gitignore'])


def test_a_repository_made_while_watching_is_asked_from_then_on(tmp_path):
    source, there = option_source(tmp_path, 'a.log', 'b')
    write(str(source / '.gitignore'), '*.log\n')
    with option_watching(tmp_path) as running:
        assert option_paths(there) == ['.gitignore', 'b']
        git_init(source)
        git(source, 'add', '-f', 'a.log')
        until(lambda: option_has(there, 'a.log'), 5, running.log)
        assert not option_has(there, '.git')


def test_a_repository_in_the_source_may_go_at_any_moment(tmp_path):
    source, there = option_source(tmp_path, 'a')
    with option_watching(tmp_path) as running:
        for number in range(6):
            git_init(source / 'sub')
            write(str(source / 'sub/.gitignore'), '*.o\n')
            for name in ('c.c', 'a.o', 'b.o'):
                write(str(source / 'sub' / name))
            until(lambda: option_has(there, 'sub/c.c'), 5, running.log)
            write(str(source / 'sub/n.o'))
            time.sleep(0.05 * number)           # at several moments
            shutil.rmtree(str(source / 'sub'))
            until(lambda: not option_has(there, 'sub'), 5, running.log)


def test_the_rules_of_a_linked_work_tree_are_taken_up_while_watching(tmp_path):
    git(tmp_path, 'init', '-q', '--template=', 'main')
    write(str(tmp_path / 'main/a'), 'a')
    git(tmp_path / 'main', 'add', 'a')
    git(tmp_path / 'main', '-c', 'user.name=n', '-c', 'user.email=e', 'commit', '-q', '-m', 'm')
    source, there = option_source(tmp_path)
    shutil.rmtree(str(source))
    git(tmp_path / 'main', 'worktree', 'add', '-q', str(source), '--detach')
    exclude, other = str(tmp_path / 'main/.git/info/exclude'), str(tmp_path / 'rules')
    git(source, 'config', 'extensions.worktreeConfig', 'true')
    write(other, '*.log\n')
    git(source, 'config', 'core.excludesFile', other)
    write(str(source / 'b.log'))
    with option_watching(tmp_path) as running:
        assert option_paths(there) == ['a'], running.log()
        write(exclude, '*.tmp\n')       # its directory is new, too
        git(source, 'config', '--unset', 'core.excludesFile')
        until(lambda: option_has(there, 'b.log'), 5, running.log)
        write(str(source / 'c.tmp'))
        write(str(source / 'd'))
        until(lambda: option_has(there, 'd'), 5, running.log)
        assert not option_has(there, 'c.tmp')
        write(exclude, '')
        until(lambda: option_has(there, 'c.tmp'), 5, running.log)
        git(source, 'config', '--worktree', 'core.excludesFile', other)
        write(str(source / 'e.log'))
        write(str(source / 'f'))
        until(lambda: option_has(there, 'f'), 5, running.log)
        assert not option_has(there, 'e.log')
        git(source, 'config', '--worktree', '--unset', 'core.excludesFile')
        until(lambda: option_has(there, 'e.log'), 5, running.log)


def test_rules_that_move_with_their_directory_are_taken_up(tmp_path):
    source, there = option_source(tmp_path, 'a/x.log', 'b/x.log', 'b/k', 'c/secret', 'nested/f')
    write(str(source / 'a/.gitignore'), '*.log\n')
    write(str(source / 'd/.gitignore'), 'secret\n')
    write(str(source / 'd/secret'), 'never sent')
    git_init(source)
    git_init(source / 'nested')
    write(str(source / 'nested/.gitignore'), '*.log\n')
    with option_watching(tmp_path) as running:
        os.rename(str(source / 'a'), str(source / 'moved'))
        os.rename(str(source / 'b'), str(source / 'a'))
        until(lambda: option_has(there, 'a/x.log'), 10, running.log)
        os.rename(str(source / 'c'), str(source / 'old'))
        os.rename(str(source / 'd'), str(source / 'c'))
        until(lambda: option_has(there, 'c/.gitignore', 'old/secret') and not option_has(there, 'd'), 10, running.log)
        os.rename(str(source / 'nested'), str(source / 'nested2'))
        until(lambda: option_has(there, 'nested2/f') and not option_has(there, 'nested/f'), 10, running.log)
        write(str(source / 'nested/a.log'))
        write(str(source / 'nested2/a.log'))
        write(str(source / 'last'))
        until(lambda: option_has(there, 'nested/a.log', 'last'), 10, running.log)
        assert not option_has(there, 'nested2/a.log')
        assert not option_has(there, 'c/secret') or (there / 'c/secret').read_bytes() == b'c/secret'


def test_a_repository_that_comes_while_watching_has_its_own_rules(tmp_path):
    source, there = option_source(tmp_path, 'plain/f', 'mine/f.tmp')
    write(str(source / '.gitignore'), '*.log\n')
    git_init(source)
    other = tmp_path / 'other'
    for name in ('.gitignore', 'f', 't.log', 'a.log'):
        write(str(other / name), '*.log\n' if name == '.gitignore' else 'x')
    git_init(other)
    git(other, 'add', '-f', 'f', 't.log')
    git_init(tmp_path / 'empty')
    write(str(tmp_path / 'empty/.git/info/exclude'), '*.tmp\n')
    with option_watching(tmp_path) as running:
        git_init(source / 'plain')
        os.rename(str(other), str(source / 'other'))
        os.rename(str(tmp_path / 'empty/.git'), str(source / 'mine/.git'))
        until(lambda: option_has(there, 'other/t.log'), 10, running.log)
        write(str(source / 'plain/a.log'))
        until(lambda: option_has(there, 'plain/a.log'), 10, running.log)
        git(source / 'other', 'add', '-f', 'a.log')
        git(source / 'other', 'rm', '-q', '--cached', 't.log')
        write(str(source / 'plain/.git/info/exclude'), '*.o\n')
        write(str(source / 'other/.git/info/exclude'), '*.o\n')
        until(lambda: option_has(there, 'other/a.log'), 10, running.log)
        write(str(source / 'other/t.log'), 'never sent')
        for name in ('other/n.o', 'plain/n.o', 'other/last', 'plain/last'):
            write(str(source / name))
        until(lambda: option_has(there, 'other/last', 'plain/last'), 10, running.log)
        assert (there / 'other/t.log').read_bytes() == b'x'
        assert not option_has(there, 'other/n.o') and not option_has(there, 'plain/n.o')
        assert option_has(there, 'mine/f.tmp') and 'removed mine' not in running.out(), 'it stays over there, untouched'


def test_a_repository_that_leads_nowhere_hides_no_change_above_it(tmp_path):
    source, there = option_source(tmp_path, 'f', 'sub/g')
    git_init(source)
    os.symlink('/nonexistent/x', str(source / 'sub/.git'))
    with option_watching(tmp_path) as running:
        write(str(source / 'new'))
        write(str(source / 'f'), 'edited')
        until(lambda: option_has(there, 'new') and (there / 'f').read_bytes() == b'edited', 10, running.log)


def test_names_that_git_could_take_for_patterns_are_names(tmp_path):
    source, there = option_source(tmp_path, 'a', ':(x)d.log/f', ':!e.log')
    write(str(source / '.gitignore'), '*.log\n')
    git_init(source)
    with option_watching(tmp_path) as running:
        for name in (':!b.log', ':(x).log', ':b', ':(top)'):
            write(str(source / name))
        write(str(source / 'last'))
        until(lambda: option_has(there, 'last', ':b', ':(top)'), 10, running.log)
        assert option_paths(there) == ['.gitignore', ':(top)', ':b', 'a', 'last']


def test_a_source_that_is_a_link_into_a_work_tree_is_looked_at_as_git_does(tmp_path):
    git_init(tmp_path / 'repository')
    write(str(tmp_path / 'repository/.gitignore'), '*.log\n')
    for name in ('a', 'a.log'):
        write(str(tmp_path / 'repository/sub' / name))
    os.symlink('repository/sub', str(tmp_path / 'src'))
    (tmp_path / 'there').mkdir()
    option_once(tmp_path)
    assert option_paths(tmp_path / 'there/src') == ['a']


def test_of_a_directory_that_is_moved_in_while_git_is_asked_nothing_ignored_is_sent(tmp_path):
    source, there = option_source(tmp_path, 'a')
    write(str(source / '.gitignore'), '*.log\n')
    git_init(source)
    for name in ('k', 'deep/er/y.log', 'y.log'):
        write(str(tmp_path / 'project' / name))
    time.sleep(0.2)                     # that it is old is the point
    env = option_git(tmp_path, '%%s; case $* in *--others*) mv %s/project %s/ ;; esac 2>/dev/null' % (tmp_path, source))
    option_once(tmp_path, env=env)
    assert option_paths(there) == ['.gitignore', 'a', 'project', 'project/deep', 'project/deep/er', 'project/k']


def test_a_repository_in_the_making_ends_nothing(tmp_path):
    source, there = option_source(tmp_path, 'a', 'b.log')
    write(str(source / '.gitignore'), '*.log\n')
    git_init(source)
    env = option_git(tmp_path, '[ -e %s/asked ] || { echo >%s/asked; echo "fatal: invalid gitfile format" >&2; exit 128; }; %%s'
                     % (tmp_path, tmp_path))
    option_once(tmp_path, env=env)
    assert option_paths(there) == ['.gitignore', 'a']


def test_rules_that_stand_elsewhere_are_taken_up_while_watching(tmp_path):
    source, there = option_source(tmp_path, 'a.log', 'b.tmp')
    write(str(tmp_path / '.gitignore'), '*.log\n')
    git_init(tmp_path)
    write(str(tmp_path / '.git/info/exclude'), '*.tmp\n')
    with option_watching(tmp_path):
        assert option_paths(there) == []
        write(str(tmp_path / '.git/info/exclude'), '')
        until(lambda: option_has(there, 'b.tmp'), 5)
        write(str(tmp_path / '.gitignore'), '')             # above SRC_DIR, in the same work tree
        until(lambda: option_has(there, 'a.log'), 5)
        write(str(source / 'asked'))
        until(lambda: option_has(there, 'asked'), 5)
        write(str(tmp_path / 'rules'), '*.new\n')
        git(tmp_path, 'config', 'core.excludesFile', str(tmp_path / 'rules'))
        write(str(source / 'c.new'))
        write(str(source / 'd'))
        until(lambda: option_has(there, 'd'), 5)
        assert not option_has(there, 'c.new')
        git(tmp_path, 'config', '--unset', 'core.excludesFile')
        until(lambda: option_has(there, 'c.new'), 5)


def test_what_is_made_while_watching_is_decided_as_git_would(tmp_path):
    source, there = option_source(tmp_path, 'a.txt', 'build/kept', 'build/b.o')
    write(str(source / '.gitignore'), 'build/\nnode_modules/\n*.o\n!main.o\n')
    git_init(source)
    git(source, 'add', '-f', 'build/kept')
    with option_watching(tmp_path):
        assert option_paths(there) == ['.gitignore', 'a.txt', 'build', 'build/kept']
        write(str(source / 'new/node_modules/deep/x'))
        write(str(source / 'new/main.o'))
        write(str(source / 'new/other.o'))
        write(str(source / 'build/c'))
        write(str(source / 'build/kept'), 'changed')
        write(str(source / 'last'))
        until(lambda: option_has(there, 'new/main.o', 'last')
              and (there / 'build/kept').read_bytes() == b'changed', 5)
        assert option_paths(there) == ['.gitignore', 'a.txt', 'build', 'build/kept', 'last', 'new',
                                       'new/main.o']
        git(source, 'add', '-f', 'new/other.o', 'build/b.o')
        until(lambda: option_has(there, 'new/other.o', 'build/b.o'), 5)
        git(source, 'rm', '-q', '--cached', 'build/b.o')
        write(str(source / 'build/b.o'), 'ignored again')
        os.rename(str(source / 'new/node_modules'), str(source / 'new/modules'))
        until(lambda: option_has(there, 'new/modules/deep/x'), 5)
        os.rename(str(source / 'a.txt'), str(source / 'a.o'))
        until(lambda: not option_has(there, 'a.txt'), 5)
        write(str(source / 'last'), 'once more')
        until(lambda: (there / 'last').read_bytes() == b'once more', 5)
        assert not option_has(there, 'a.o') and (there / 'build/b.o').read_bytes() == b'build/b.o'


@pytest.mark.parametrize('far', OPTION_FARS)
def test_what_git_ignores_hides_no_other_name_over_there(tmp_path, far):
    """Its own may hold what find takes for a pattern."""
    source, _ = option_source(tmp_path, 'a*', 'ab', 'x?', 'xy', '[b]', 'b', 'c\\d', 'cd')
    write(str(source / '.gitignore'), 'a\\*\nx\\?\n\\[b]\nc\\\\d\n')
    option_age(source)
    option_once(tmp_path, far=far)
    assert option_paths(option_replica(tmp_path, far)) == ['.gitignore', 'ab', 'b', 'cd', 'xy']
    assert option_once(tmp_path, far=far).stdout == 'in step\n'


def test_ignored_directories_are_neither_listed_nor_watched(tmp_path):
    source, there = option_source(tmp_path, 'a/b/c', *('node_modules/m%d/lib/x' % n for n in range(40)),
                                  'secret/x')
    write(str(source / '.gitignore'), 'node_modules/\nsecret/\n')
    git_init(source)
    with option_watching(tmp_path) as running:
        watches = 0
        for name in os.listdir('/proc/%d/fdinfo' % running.process.pid):
            watches += running.read('/proc/%d/fdinfo/%s' % (running.process.pid, name)).count('inotify wd:')
        assert 3 <= watches <= 6                # the root, a, a/b; and git's own directory
    os.chmod(str(source / 'secret'), 0)
    try:                                        # nobody with no power at all but that the files are its own
        done = subprocess.run([need('setpriv'), '--inh-caps=-all', '--bounding-set=-all',
                               *command('--no-replicate-on-change', source, tmp_path / 'there', 'bash')],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b'')
        done = subprocess.run([need('setpriv'), '--inh-caps=-all', '--bounding-set=-all', 'ls',
                               str(source / 'secret')],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode, 'this test proves nothing: the directory can be read'
    finally:
        os.chmod(str(source / 'secret'), 0o700)
    assert option_paths(there) == ['.gitignore', 'a', 'a/b', 'a/b/c']


def option_git(tmp_path, text):
    """An environment where git is these commands, in which %s is the real one, run with git's words."""
    write(str(tmp_path / 'path/git'), '#!/bin/sh\nstatus=0\n%s\nexit $status\n' % (
        text % ('{ %s "$@"; status=$?; }' % need('git'))), 0o755)
    return {'PATH': '%s:%s' % (tmp_path / 'path', os.environ['PATH'])}


def option_path_without_git(tmp_path):
    tools = tmp_path / 'tools'
    tools.mkdir()
    for directory in ('/usr/bin', '/bin', '/usr/sbin', '/sbin'):
        for name in os.listdir(directory):
            if not name.startswith('git') and not os.path.lexists(str(tools / name)):
                os.symlink(os.path.join(directory, name), str(tools / name))
    return {'PATH': str(tools)}


def test_what_comes_while_git_is_asked_is_left_out_as_what_was_there(tmp_path):
    source, there = option_source(tmp_path, 'a', 'd/b')
    write(str(source / '.gitignore'), 'build\n*.o\n')
    git_init(source)
    env = option_git(tmp_path, '%%s; case $* in *--others*) cd %s; mkdir -p build d/build; echo >build/in; '
                     'echo >d/build/in; echo >e.o; echo >d/e.o; echo >new ;; esac' % source)
    with option_watching(tmp_path, env=env) as running:
        until(lambda: option_has(there, 'new'), 5, running.log)
        running.in_step()
        assert option_paths(there) == ['.gitignore', 'a', 'd', 'd/b', 'new']


def test_a_gitignore_that_changes_while_git_is_asked_is_taken_up(tmp_path):
    source, there = option_source(tmp_path, 'a', 'd/late')
    write(str(source / '.gitignore'), '*.o\n')
    git_init(source)
    env = option_git(tmp_path, '%%s; case $* in *--others*) cd %s; grep -q late .gitignore || echo late >>.gitignore ;; esac'
                     % source)
    with option_watching(tmp_path, env=env) as running:
        assert option_paths(there) == ['.gitignore', 'a', 'd'], running.log()


def test_git_missing_where_a_gitignore_stands_is_a_clear_error(tmp_path):
    source, there = option_source(tmp_path, 'a', 'deep/b')
    env = option_path_without_git(tmp_path)
    option_once(tmp_path, env=env)
    assert option_has(there, 'a', 'deep/b')
    with option_watching(tmp_path, env=env) as running:
        write(str(source / 'deep/.gitignore'), 'b\n')
        running.says('--no-gitignore', 5)       # whether it ends then or goes on, it says so
    error = option_once(tmp_path, env=env, expect=1).stderr
    assert len(error.splitlines()) == 1 and 'deep/.gitignore' in error and '--no-gitignore' in error
    option_once(tmp_path, '--no-gitignore', env=env)


@pytest.mark.skipif(os.getuid() != 0, reason='giving a directory to somebody else needs root')
def test_git_refusing_a_repository_of_somebody_else_is_a_clear_error(tmp_path):
    source, there = option_source(tmp_path, 'a')
    git_init(source)
    for directory, names, files in os.walk(str(source)):
        for name in ['.', *files]:
            os.chown(os.path.join(directory, name), 12345, 12345)
    (tmp_path / 'home').mkdir()
    env = {'HOME': str(tmp_path / 'home'), 'XDG_CONFIG_HOME': str(tmp_path / 'home')}
    error = option_once(tmp_path, env=env, expect=1).stderr
    assert 'dubious ownership' in error and '--no-gitignore' in error and len(error.splitlines()) == 1
    assert not there.exists() or option_paths(there) == []
    option_once(tmp_path, '--no-gitignore', env=env)


def test_nested_repositories_and_submodules_follow_their_own_rules(tmp_path):
    source, there = option_source(tmp_path, 'a', 'nested/b.log', 'nested/b.o', 'vendor/dropped/x')
    write(str(source / '.gitignore'), '*.log\nvendor/\n')
    write(str(source / 'nested/.gitignore'), '*.o\n')
    for top in (source, source / 'nested', source / 'vendor/dropped', tmp_path / 'library'):
        git_init(top)
    write(str(tmp_path / 'library/l'))
    git(tmp_path / 'library', 'add', 'l')
    git(tmp_path / 'library', 'commit', '-qm', 'l')
    git(source, 'submodule', '-q', 'add', tmp_path / 'library', 'sub')
    write(str(source / 'sub/.gitignore'), '*.tmp\n')
    write(str(source / 'sub/m.tmp'))
    write(str(source / 'sub/m.log'))
    with option_watching(tmp_path):
        wanted = ['.gitignore', '.gitmodules', 'a', 'nested', 'nested/.gitignore', 'nested/b.log', 'sub',
                  'sub/.gitignore',
                  'sub/l', 'sub/m.log']
        assert option_paths(there) == wanted
        for path in ('nested/new.o', 'nested/new.log', 'sub/new.tmp', 'sub/new.txt', 'new.log',
                     'vendor/dropped/y'):
            write(str(source / path))
        git_init(source / 'later')              # a repository that comes while we watch
        write(str(source / 'later/.gitignore'), 'z\n')
        write(str(source / 'later/z'))
        write(str(source / 'later/w'))
        until(lambda: option_has(there, 'nested/new.log', 'sub/new.txt', 'later/w'), 5)
        left_out = {'nested/new.o', 'sub/new.tmp', 'new.log', 'vendor', 'later/.git'}
        assert left_out & set(option_paths(there)) == set()
        write(str(source / 'sub/.gitignore'), '')
        until(lambda: option_has(there, 'sub/m.tmp', 'sub/new.tmp'), 5)
    option_once(tmp_path)
    assert not option_has(there, 'nested/new.o', 'vendor')


def test_a_commit_or_a_checkout_while_watching_brings_the_replica_along(tmp_path):
    source, there = option_source(tmp_path, 'a', 'dir/b')
    git_init(source)
    git(source, 'add', '.')
    git(source, 'commit', '-qm', 'one')
    git(source, 'checkout', '-qb', 'other')
    git(source, 'rm', '-q', 'dir/b')
    write(str(source / '.gitignore'), '*.o\n')
    write(str(source / 'c'), 'c')
    git(source, 'add', '.')
    git(source, 'commit', '-qm', 'two')
    write(str(source / 'x.o'))
    with option_watching(tmp_path) as running:
        assert option_paths(there) == ['.gitignore', 'a', 'c']
        git(source, 'checkout', '-q', '-')          # no rules there: x.o is no longer ignored
        until(lambda: option_paths(there) == ['a', 'dir', 'dir/b', 'x.o'], 5, running.log)
        git(source, 'checkout', '-q', 'other')
        until(lambda: option_has(there, '.gitignore', 'c') and not option_has(there, 'dir'), 5, running.log)


def test_asking_git_costs_little(tmp_path):
    source, _ = option_source(tmp_path)
    for n in range(3000):
        write(str(source / ('d%d/e%d/f%d' % (n % 10, n % 100, n))))
    git_init(source)
    write(str(source / '.gitignore'), '*.log\n')
    times = {}
    for option in ('--no-gitignore', '--gitignore'):
        began = time.monotonic()
        once('--no-replicate-on-change', '--dry-run', option, source, tmp_path / 'there', 'bash')
        times[option] = time.monotonic() - began
    print('3,000 files looked at and compared:', times)


# ---- --exclude

@pytest.mark.parametrize('pattern, left_out, kept', [
    ('*.log', 'a.log d/a.log d/e/.log', 'a.logs alog d/log'),
    ('name', 'name name/ d/name d/e/name/', 'names aname d/nam'),
    ('name/', 'name/ d/name/', 'name d/name names/'),
    ('/name', 'name name/', 'd/name d/name/'),
    ('/name/', 'name/', 'name d/name/'),
    ('d/name', 'd/name d/name/', 'name e/d/name'),
    ('d/name/', 'd/name/', 'd/name e/d/name/'),
    ('d/*', 'd/a d/.b d/c/', 'd/ d/c/e e/d/a'),
    ('d/**', 'd/a d/c/e', 'd/ e/d/a'),
    ('**/name', 'name d/name d/e/name/', 'names d/names'),
    ('/**/name', 'name d/name d/e/name/', 'names'),
    ('d/**/name', 'd/name d/e/name d/e/f/name', 'name e/d/name d/names'),
    ('?.c', 'a.c d/é.c', '.c ab.c d/.c'),
    ('d?e', 'd.e dde', 'd/e'),
    ('[ab].c', 'a.c d/b.c', 'c.c ab.c'),
    ('[!ab].c', 'c.c d/d.c', 'a.c b.c .c'),
    ('[^ab].c', 'c.c', 'a.c d/b.c'),
    ('[a-c]x', 'ax d/cx', 'dx -x'),
    ('d[!a]e', 'dbe', 'd/e dae'),
    ('[]]', ']', '[ []'),
    ('[!-_]*', 'A1 5', '-x _x'),
    ('[!]a]x', 'bx', ']x ax'),
    ('[--A]', '- . 5 A', 'a'),
    ('[---]', '-', 'a'),
    ('[a-]', 'a -', 'b'),
    ('[&&~~||]', '& ~ |', 'a'),
    ('[[]', '[ d/[', ']'),
    ('[', '[', 'a'),
    ('a.c', 'a.c', 'abc'),
    ('a+(b)|c$^', 'a+(b)|c$^', 'aab ab c'),
    ('a b', 'a b d/a b', 'ab'),
    ('.*', '.git .a d/.b', 'a d/e'),
    ('*\n*', 'a\nb', 'ab'),
    ('{a,b}', '{a,b}', 'a b'),
    ('*', 'a .b d/', ''),
])
def test_a_pattern_leaves_out_exactly_what_it_says(pattern, left_out, kept):
    regex, only_directories = fr.pattern_regex(pattern)

    def excludes(path):
        return bool(regex.fullmatch(path.rstrip('/')) and (path.endswith('/') or not only_directories))
    words = [re.findall(r'a b|d/a b', text) if ' ' in pattern else text.split(' ')
             for text in (left_out, kept)]
    assert [path for path in words[0] if path and not excludes(path)] == []
    assert [path for path in words[1] if path and excludes(path)] == []


def test_patterns_mean_what_they_mean_to_git(tmp_path):
    """Where both have the same forms: a table of our own could repeat a mistake of our own."""
    chance = random.Random(4)
    git_init(tmp_path)
    paths = sorted({'/'.join(chance.choice(['a', 'b', 'ab', 'c.o', '.a', 'bb', 'c'])
                             for _ in range(chance.randint(1, 4)))
                    for _ in range(300)})
    asked = b''.join(path.encode() + b'\0' for path in paths)
    for _ in range(150):
        names = [chance.choice(['a', 'b', '*', '?', '[ab]', '[!a]', '*.o', 'a*', '**', 'c', '?b', '[^b]*',
                                '.*'])
                 for _ in range(chance.randint(1, 3))]
        pattern = chance.choice(['', '/']) + '/'.join(names)
        if set(names) == {'**'}:
            continue                            # all and everything: git's own forms differ here
        write(str(tmp_path / '.git/info/exclude'), pattern + '\n')
        said = subprocess.run(['git', '-C', str(tmp_path), 'check-ignore', '--no-index', '-z', '--stdin'],
                              input=asked,
                              stdout=subprocess.PIPE).stdout.decode().split('\0')
        regex, _ = fr.pattern_regex(pattern)
        ours = [path for path in paths
                if any(regex.fullmatch('/'.join(path.split('/')[:n])) for n in range(1, path.count('/') + 2))]
        assert set(ours) == set(said) - {''}, pattern


@pytest.mark.parametrize('pattern', ['', '/', '//', '[z-a]', '[a--]x', '[[:digit:]]'])
def test_a_pattern_that_is_none_is_a_wrong_command_line(tmp_path, pattern):
    option_source(tmp_path)
    assert 'pattern' in option_once(tmp_path, '--exclude', pattern, expect=2).stderr


OPTION_EXCLUDES = ['*.log', 'name', 'dir/', '/top', 'in/ner', 'x/**/y', '[ab].c', '.*', 'q?', 'back\\slash',
                   '**', '*', 'é*']


@pytest.mark.parametrize('pattern, far', [(pattern, far) for far in OPTION_FARS for pattern in OPTION_EXCLUDES
                                          if far == 'bash' or pattern in ('dir/', '.*', '[ab].c', 'x/**/y')])
def test_excluded_is_never_sent_never_deleted_and_the_rest_is_mirrored(tmp_path, pattern, far):
    """Each pattern, the same names here, over there, and only over there."""
    names = ['a.log', 'd/a.log', 'name', 'd/name/n', 'dir/f', 'e/dir', 'top', 'd/top', 'in/ner/f', 'in/x',
             'x/y', 'x/z/y', 'x/z/z', 'a.c', 'd/b.c', 'c.c', '.hidden', '.d/f', 'd/.e', 'q1', 'd/q2', 'q',
             'back\\slash', 'élan', 'plain']
    source, _ = option_source(tmp_path, *names)
    there = option_replica(tmp_path, far)
    for name in names:
        write(os.path.join(there, os.path.dirname(name), 'only-' + os.path.basename(name)))
        write(os.path.join(there, name), 'older bytes')
        write(os.path.join(there, 'stale', name), 'stale')
    regex, only_directories = fr.pattern_regex(pattern)

    def excluded(root, path):
        parts = path.split('/')
        return any(regex.fullmatch('/'.join(parts[:n])) and (not only_directories or os.path.isdir(
            os.path.join(str(root), '/'.join(parts[:n])))) for n in range(1, len(parts) + 1))
    wanted = {path: 'excluded' for path in option_paths(there) if excluded(there, path) and path[-1] != '/'}
    wanted.update((path, 'sent') for path in option_paths(source) if not excluded(source, path))
    wanted.update((above, 'kept for what is in it') for path in list(wanted) if wanted[path] == 'excluded'
                  for above in [path[:at.start()] for at in re.finditer('/', path)] if above not in wanted)
    first = option_once(tmp_path, '--mirror', '--exclude', pattern, far=far, timeout=15)
    assert sorted(wanted) == option_paths(there), first.stdout + first.stderr
    for name in names:
        with open(os.path.join(there, name), 'rb') as file:
            assert file.read() == (b'older bytes' if wanted[name] == 'excluded' else name.encode()), name
    again = option_once(tmp_path, '--mirror', '--exclude', pattern, far=far)
    assert again.stdout == 'in step\n'          # a restart sends nothing: what stands there is listed rightly


@pytest.mark.parametrize('far', OPTION_FARS)
def test_a_file_renamed_out_of_and_into_exclusion(tmp_path, far):
    source, _ = option_source(tmp_path, 'a.tmp', 'b', 'cache/c', 'd/e', 'keep.tmp')
    there = option_replica(tmp_path, far)
    write(os.path.join(there, 'keep.tmp'), 'theirs')
    with option_watching(tmp_path, '--exclude', '*.tmp', '--exclude', 'cache/', '--mirror',
                         far=far) as running:
        assert option_paths(there) == ['b', 'd', 'd/e', 'keep.tmp']
        for old, new in ('a.tmp', 'a'), ('b', 'b.tmp'), ('cache', 'cached'), ('d', 'cache'):
            os.rename(str(source / old), str(source / new))
        until(lambda: option_paths(there) == ['a', 'cached', 'cached/c', 'keep.tmp'], 10,
              lambda: (option_paths(there), running.log()))
        write(str(source / 'cache/new'))
        write(str(source / 'cached/new.tmp'))
        write(str(source / 'cached/new'))
        os.unlink(str(source / 'keep.tmp'))
        until(lambda: option_has(there, 'cached/new'), 5)
        assert option_paths(there) == ['a', 'cached', 'cached/c', 'cached/new', 'keep.tmp']
        with open(os.path.join(there, 'keep.tmp')) as file:
            assert file.read() == 'theirs'


# ---- --checksum, --dry-run

@pytest.mark.parametrize('far', [*OPTION_FARS, 'dash'])
def test_checksum_repairs_what_size_and_time_hide_and_sends_no_bytes_where_they_are_equal(tmp_path, far):
    names = ['same', 'other', 'later', 'd/other two', 'new\nline', '\n', 'back\\slash', '-n', 'empty', 'é',
             '\udcff']
    source, _ = option_source(tmp_path, *names)
    write(str(source / 'large'), os.urandom(3 << 20))
    option_age(source)
    there = option_replica(tmp_path, far)
    option_once(tmp_path, far=far)
    for name in names + ['large']:
        path = os.path.join(there, name)
        at = os.stat(path).st_mtime_ns
        if name == 'later':
            os.utime(path, ns=(at, at - 10**12))
        elif name not in ('same', 'empty'):
            with open(path, 'r+b') as file:
                file.seek(-1, os.SEEK_END)
                file.write(b'\0')
            os.utime(path, ns=(at, at))
    assert option_once(tmp_path, '--dry-run', far=far).stdout.count('would send') <= 1
    assert difference(str(source), there, True)
    done = option_once(tmp_path, '--checksum', far=far)
    assert not difference(str(source), there, whole_seconds=far == 'busybox only'), done.stdout + done.stderr
    sent = option_lines(done.stdout, 'sent')
    assert not {'same', 'later', 'empty'} & set(sent), done.stdout
    assert 'later' in option_lines(done.stdout, 'updated'), done.stdout
    assert not option_lines(option_once(tmp_path, '--checksum', far=far).stdout, 'sent', 'updated')


@pytest.mark.parametrize('far', [*OPTION_FARS, 'dash'])
@pytest.mark.parametrize('name', ['\n', 'n\n', '\\', '\n./\n', '\r'])
def test_checksum_knows_the_sum_of_a_file_however_its_name_ends(tmp_path, name, far):
    source, _ = option_source(tmp_path)
    write(str(source / name), mtime_ns=10**18)
    option_once(tmp_path, far=far)
    assert not option_lines(option_once(tmp_path, '--checksum', far=far).stdout, 'sent', 'updated')


def test_checksum_where_the_far_side_can_make_none_says_so_and_sends_nothing_that_looks_the_same(tmp_path):
    source, there = option_source(tmp_path, 'a')
    words = shell_command(tmp_path, 'dash')
    once('--no-replicate-on-change', source, there.parent, *words)
    for name in ('sha256sum', 'sha1sum', 'md5sum'):
        write(str(tmp_path / 'shims-dash' / name), '#!/bin/sh\nexit 1\n', 0o755)
    done = once('--no-replicate-on-change', '--checksum', source, there.parent, *words, expect=None)
    assert 'sha256sum' in done.stderr and 'sent' not in done.stdout, (done.stdout, done.stderr)


@pytest.mark.parametrize('far, exists, options', [
    (far, exists, options.split()) for far in OPTION_FARS for exists in (True, False)
    for options in ('', '--mirror', '--clean-out-first', '--checksum --mirror')
    if far == 'bash' or (exists and options)], ids=str)
def test_a_dry_run_changes_nothing_and_says_what_would_be_done(tmp_path, options, exists, far):
    source, _ = option_source(tmp_path, 'a', 'd/b', 'same', 'mode', 'empty/')
    os.symlink('a', str(source / 'link'))
    there = option_replica(tmp_path, far)
    if exists:
        option_once(tmp_path, far=far)
        write(os.path.join(there, 'a'), 'other')
        write(os.path.join(there, 'stale/s'), 's')
        write(os.path.join(there, '.file_replicator.0123456789ab/x'), 'a staging of another session')
        os.chmod(os.path.join(there, 'mode'), 0o600)
        shutil.rmtree(os.path.join(there, 'd'))
    before = tree_of(os.path.dirname(there))
    dry = option_once(tmp_path, '--dry-run', '--hook', 'touch %s' % (tmp_path / 'hooked'), '--remote-hook',
                      'touch hooked',
                      *options, far=far)
    assert tree_of(os.path.dirname(there)) == before and not (tmp_path / 'hooked').exists()
    real = option_once(tmp_path, *options, far=far)
    plain = {'sent': 'send', 'made': 'make', 'linked': 'link', 'removed': 'remove', 'renamed': 'rename',
             'updated': 'update'}
    did = sorted('would %s %s' % (plain[verb], path) for verb in plain
                 for path in option_lines(real.stdout, verb))
    would = sorted(line.rstrip('/') for line in dry.stdout.splitlines() if line.startswith('would ')
                   # a directory's time is not worth a line
                   and not re.match(r'would update (\.|d|empty|stale)$', line))
    if '--clean-out-first' in options:
        assert not exists or re.search('^would (remove|empty|clean)', dry.stdout, re.M), dry.stdout
        would, did = ([line for line in lines if not line.startswith('would remove')] for lines in (would, did))
    assert would == did, (dry.stdout, real.stdout)
    assert 'in step' not in dry.stdout or not would, 'nothing is in step if something would be done'


def test_a_dry_run_where_nothing_differs_says_nothing_but_that(tmp_path):
    option_source(tmp_path, 'a', 'd/b')
    option_once(tmp_path)
    assert option_once(tmp_path, '--dry-run').stdout == 'in step\n'


# ---- --update-interval, --hook, --remote-hook

@pytest.mark.parametrize('far', OPTION_FARS)
def test_a_file_that_changes_all_the_time_is_sent_at_once_then_once_per_interval_to_the_last(tmp_path, far):
    source, _ = option_source(tmp_path, 'log', 'other')
    option_age(source)                          # else it is sent at the start again
    there = option_replica(tmp_path, far)
    option_once(tmp_path, far=far)
    with option_watching(tmp_path, '--update-interval', 1, far=far) as running:
        began, count = time.monotonic(), 0
        while time.monotonic() - began < 2.6:
            count += 1
            write(str(source / 'log'), 'line %d' % count)
            if count == 1:
                until(lambda: running.out().count('sent log') == 1, 0.9, running.log)
            time.sleep(0.03)                    # the pace of the writer
        at = time.monotonic()
        write(str(source / 'other'), 'an edit does not wait for it')
        until(lambda: open(os.path.join(there, 'other')).read().startswith('an edit'), 0.9)
        until(lambda: open(os.path.join(there, 'log')).read() == 'line %d' % count, 3, running.log)
        assert time.monotonic() - at < 2.5
        assert 3 <= running.out().count('sent log') <= 5, (count, running.out())
        for text in ('one', 'another, and then nothing'):       # of two changes the second does not need a third to be sent
            write(str(source / 'log'), text)
            until(lambda: open(os.path.join(there, 'log')).read() == text, 2.5, running.log)
        os.unlink(str(source / 'log'))
        until(lambda: not option_has(there, 'log'), 0.9)       # a removal is no change to wait for


def option_hook(tmp_path, kind):
    """Options for a hook that notes what it is told, and what reads those notes: a list of path lists."""
    note = 'cat; printf "|"'
    if kind == '--hook':
        notes = tmp_path / 'notes'
        words = [kind, '{ %s; } >>%s' % (note, shlex.quote(str(notes)))]
    else:
        notes = tmp_path / 'there' / 'notes'
        words = [kind, '{ %s; } >>../notes' % note]

    def read():
        if not notes.exists():
            return []
        rounds = notes.read_bytes().decode().split('|')[:-1]
        assert all(each.endswith('\0') for each in rounds)
        return [each.split('\0')[:-1] for each in rounds]
    return words, read


@pytest.mark.parametrize('kind', ['--hook', '--remote-hook'])
def test_a_hook_gets_the_paths_of_each_round_and_is_not_run_when_nothing_changed(tmp_path, kind):
    names = ['a', 'd/b', 'new\nline', '-n', ' lead', 'é']
    source, there = option_source(tmp_path, *names)
    words, notes = option_hook(tmp_path, kind)
    with option_watching(tmp_path, *words) as running:
        until(notes, 5, running.log)
        assert len(notes()) == 1 and sorted(notes()[0]) == sorted([*names, 'd'])
        write(str(source / 'a'), 'changed')
        until(lambda: len(notes()) > 1, 5)
        assert notes()[1:] == [['a']]
        os.unlink(str(source / 'd/b'))
        until(lambda: notes()[-1] == ['d/b'], 5)
        os.rename(str(source / 'a'), str(source / 'z'))
        until(lambda: notes()[-1] == ['z'] or sorted(notes()[-1]) == ['a', 'z'], 5, notes)
        os.utime(str(source / 'd'))
    count = len(notes())
    option_once(tmp_path, *words)
    assert len(notes()) == count, notes()[count:]
    write(str(source / 'z'), 'changed while nobody watched')
    option_once(tmp_path, *words)
    assert notes()[count:] == [['z']]


@pytest.mark.parametrize('far', OPTION_FARS)
def test_a_remote_hook_runs_in_the_replica_and_cannot_eat_the_stream(tmp_path, far):
    source, _ = option_source(tmp_path, 'a')
    there = option_replica(tmp_path, far)
    hook = '''pwd -P >../where; cat >/dev/null; dd of=/dev/null 2>/dev/null; echo "quotes '\\" kept"; cat'''
    with option_watching(tmp_path, '--remote-hook', hook, far=far) as running:
        for n in range(5):
            write(str(source / ('n%d' % n)), b'\0binary\n' * 9)
            until(lambda: option_has(there, 'n%d' % n), 10, running.log)
        running.says('remote hook: ')
        assert 'quotes \'" kept' in running.err() and 'connection lost' not in running.log()
    with open(os.path.join(os.path.dirname(there), 'where')) as file:
        assert file.read().rstrip('\n').endswith('/src')
    assert not difference(str(source), there, whole_seconds=far != 'bash')


@pytest.mark.parametrize('kind', ['--hook', '--remote-hook'])
@pytest.mark.parametrize('hook, said', [('exit 3', '3'), ('echo to its output', 'to its output'),
                                        ('echo wrong >&2; exit 1', 'wrong'),
                                        ('no-such-command-anywhere', 'not found'), ('kill -9 $$', 'status'),
                                        ("printf '\\033[2J\\377'", '\\x1b[2J'), ('"', 'hook'),
                                        ('echo "0123456789ab 9 0"; echo + 9; echo stop now', 'stop now'),
                                        ('for f in .*; do echo "$f 60 2"; done; echo all', 'all')])
def test_a_hook_that_fails_or_prints_is_shown_and_stops_nothing(tmp_path, kind, hook, said):
    source, there = option_source(tmp_path, 'a')
    with option_watching(tmp_path, kind, hook) as running:
        running.says(said, 5)
        write(str(source / 'b'))
        until(lambda: option_has(there, 'b'), 5, running.log)
        assert 'hook' in running.err() and said in running.err() and 'connection lost' not in running.err()
        assert '\033' not in running.log()
    write(str(source / 'c'))
    done = option_once(tmp_path, kind, hook, expect=0)
    assert said in done.stderr and option_has(there, 'c')


@pytest.mark.parametrize('kind', ['--hook', '--remote-hook'])
def test_a_hook_that_does_not_read_is_no_trouble_whatever_the_number_of_paths(tmp_path, kind):
    option_source(tmp_path, *('d/%s%d' % ('long' * 50, n) for n in range(1000)))
    done = option_once(tmp_path, kind, 'exit 0')
    assert done.stderr == '', done.stderr


@pytest.mark.parametrize('kind', ['--hook', '--remote-hook'])
def test_a_hook_that_leaves_a_server_running_does_not_hold_up_the_next(tmp_path, kind):
    """The example of the README: a server is started anew."""
    source, there = option_source(tmp_path, 'a')
    with option_watching(tmp_path, kind, 'echo started; sleep 12 &') as running:
        until(lambda: running.err().count('started') == 1, 5, running.log)
        write(str(source / 'a'), 'changed')
        until(lambda: running.err().count('started') == 2, 5, running.log)
        assert running.stop() == 0
    began = time.monotonic()
    write(str(source / 'a'), 'changed again')
    option_once(tmp_path, kind, 'sleep 12 &')
    assert time.monotonic() - began < 6


def test_a_server_that_a_remote_hook_started_outlives_the_connection_and_makes_files_as_usual(tmp_path):
    source, there = option_source(tmp_path, 'a')
    hook = 'echo >>../made; [ -e ../pid ] || { setsid sleep 60 >/dev/null 2>&1 </dev/null & echo $! >../pid; }'
    with option_watching(tmp_path, '--remote-hook', hook) as running:
        pid = until(lambda: (tmp_path / 'there' / 'pid').exists() and (tmp_path / 'there' / 'pid').read_text().strip())
        try:
            assert stat.S_IMODE((tmp_path / 'there' / 'made').stat().st_mode) == 0o644
            running.cut()
            write(str(source / 'a'), 'changed')
            until(lambda: (there / 'a').read_bytes() == b'changed', 10, running.log)
            with open('/proc/%s/cmdline' % pid) as file:
                assert file.read().startswith('sleep')
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def test_edits_do_not_wait_for_a_slow_hook_here(tmp_path):
    source, there = option_source(tmp_path, 'a')
    with option_watching(tmp_path, '--hook', 'echo $$ >>../hook; exec sleep 30', cwd=str(source)) as running:
        pid = until(lambda: os.path.exists(str(tmp_path / 'hook')) and (tmp_path / 'hook').read_text().strip())
        write(str(source / 'a'), 'changed')
        until(lambda: (there / 'a').read_bytes() == b'changed', 3)
        running.in_step(2)
        assert running.stop() == 0
    until(lambda: not os.path.exists('/proc/' + pid), 5)
    assert (tmp_path / 'hook').read_text().split() == [pid]         # nor is it run for what was waiting


def test_a_remote_hook_may_take_longer_than_anything_else_may(tmp_path, monkeypatch, capfd):
    source, there = option_source(tmp_path, 'a')
    option_age(source)          # or it would be sent again, and the hook run again, for as long as it is lost
    monkeypatch.setattr(fr, 'SILENT_SECONDS', 0.5)
    words = ['--no-replicate-on-change', '--remote-hook', 'sleep 1.5; echo it took its time']
    assert fr.replicate(fr.parse([*words, str(source), str(there.parent), 'bash'])) == 0
    assert capfd.readouterr().err == 'file_replicator: remote hook: it took its time\n'


# ---- --wait, --log-file, --quiet

def test_wait_keeps_trying_until_the_far_side_is_up(tmp_path):
    source, there = option_source(tmp_path, 'a')
    late = ['sh', '-c', '[ -e "$0" ] || { echo not yet >&2; exit 255; }; exec bash', str(tmp_path / 'up')]
    error = once(source, there.parent, *late, expect=1).stderr
    assert 'not yet' in error and '--wait' in error and 'ssh' in error
    with Running(tmp_path, '--wait', source, there.parent, *late, wait=False) as running:
        running.says('waiting for the far side', 5)
        assert 'not yet' in running.err() and not there.exists()
        write(str(source / 'b'), 'made while it waits')
        write(str(tmp_path / 'up'))
        until(lambda: option_has(there, 'a', 'b'), 12, running.log)
        running.in_step()
        assert running.err().count('not yet') == 1, running.err()


def test_another_reason_why_there_is_no_connection_is_said_too(tmp_path, monkeypatch):
    source, there = option_source(tmp_path, 'a')
    fault_other_number(monkeypatch, tmp_path, 'REASONS_MOST = 10, 5', 'REASONS_MOST = 0, 5')
    connect = ('echo >>"$0"; tries=$(wc -l <"$0"); [ "$tries" -gt 3 ] || { echo "no route $tries" >&2; exit 255; }\n'
               '[ "$tries" -gt 6 ] || { echo "not allowed $tries" >&2; exit 255; }; exec bash')
    with Running(tmp_path, '--wait', source, there.parent, 'sh', '-c', connect, tmp_path / 'tries') as running:
        assert running.err().count('no route') == 1 and running.err().count('still no connection') == 1
        assert 'still no connection: the connection command ended with status 255: not allowed' in running.err()


def test_it_tries_less_and_less_often_until_a_connection_has_lasted(tmp_path, monkeypatch):
    """To have lasted takes five seconds, and half a one here."""
    source, there = option_source(tmp_path, 'a')
    fault_other_number(monkeypatch, tmp_path, 'self.since > 5:', 'self.since > 0.5:')
    connect = ['sh', '-c', 'date +%s.%N >>"$0"; [ "$(wc -l <"$0")" -gt 5 ] && [ ! -e "$0.down" ] || exit 255; exec bash',
               str(tmp_path / 'tries')]

    def tries():
        return [float(line) for line in (tmp_path / 'tries').read_text().split()]
    with Running(tmp_path, '--wait', source, there.parent, *connect) as running:
        assert tries()[-1] - tries()[-2] > 0.7
        at = time.monotonic()
        until(lambda: time.monotonic() - at > 0.6)
        at = time.time()
        running.cut()
        until(lambda: len(tries()) > 6)
        assert tries()[-1] - at < 1.5
        running.says('connected again')
        at = time.monotonic()
        until(lambda: time.monotonic() - at > 0.6)
        write(str(tmp_path / 'tries.down'))         # nor is it tried in a loop once one that lasted is gone
        running.cut()
        until(lambda: len(tries()) > 11)
        assert tries()[-1] - tries()[-2] > 0.7


def test_the_log_file_has_all_lines_with_the_time_also_under_quiet(tmp_path):
    source, there = option_source(tmp_path, 'a', 'd/b')
    os.mkfifo(str(source / 'fifo'))
    log = tmp_path / 'log'
    loud = option_once(tmp_path, '--log-file', log)
    lines = log.read_text().splitlines()
    assert all(re.match(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S', line) for line in lines), lines
    said = [line[20:] for line in lines]
    assert [line for line in said if line in loud.stdout] == loud.stdout.splitlines()
    assert any('fifo' in line for line in said) and 'fifo' in loud.stderr
    assert len(said) == loud.stdout.count('\n') + 1
    write(str(source / 'c'))
    quiet = option_once(tmp_path, '--quiet', '--log-file', log)
    assert quiet.stdout == '' and 'fifo' in quiet.stderr
    assert log.read_text().splitlines()[:len(lines)] == lines                   # it is appended to
    assert any(line[20:].startswith('sent c (') for line in log.read_text().splitlines()[len(lines):])
    error = option_once(tmp_path, '--log-file', tmp_path / 'no' / 'log', expect=1).stderr
    assert len(error.splitlines()) == 1 and 'No such file' in error


def test_the_last_words_are_in_the_log_file_too(tmp_path):
    source, there = option_source(tmp_path, 'a')
    error = once('--log-file', tmp_path / 'log', source, there.parent, 'sh', '-c', 'echo oops >&2; exit 9',
                 expect=1).stderr
    assert 'oops' in error and 'oops' in (tmp_path / 'log').read_text()


def test_a_log_file_inside_of_what_is_replicated_does_not_go_round_in_circles(tmp_path):
    source, there = option_source(tmp_path, 'a')
    log = source / 'replicator.log'
    with option_watching(tmp_path, '--log-file', log, wait=False) as running:
        until(lambda: option_has(there, 'a') and running.out().count('in step')
              or running.out().count('sent replicator') > 9)
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 1.5 or running.out().count('sent replicator.log') > 9, 5)
        assert running.out().count('sent replicator.log') <= 2, running.out()


def test_quiet_says_only_what_is_wrong(tmp_path):
    source, there = option_source(tmp_path, 'a')
    with option_watching(tmp_path, '--quiet', wait=False) as running:
        until(lambda: option_has(there, 'a'), 10)
        write(str(source / 'b'))
        until(lambda: option_has(there, 'b'), 5)
        assert running.log() == ''
        os.mkfifo(str(source / 'fifo'))
        running.says('fifo', 5)
        assert running.out() == ''


# ---- what is seen: terminals, pipes, messages, --help

def option_on_terminal(words, env=None, seconds=30):
    """Runs the program with a terminal as its standard error: (status, output, what the terminal got)."""
    ours, theirs = pty.openpty()
    environment = {**{k: v for k, v in os.environ.items() if k != 'NO_COLOR'}, **(env or {})}
    process = subprocess.Popen(command(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=theirs,
                               env=environment, start_new_session=True)
    os.close(theirs)
    seen = b''
    with contextlib.suppress(OSError):          # EIO is how a terminal ends
        while True:
            data = os.read(ours, 65536)
            seen += data
            if not data:
                break
    os.close(ours)
    out = process.communicate(timeout=seconds)[0]
    return process.returncode, out.decode(), seen.decode()


OPTION_SLOW = '''
import os, subprocess, sys, time
shell = subprocess.Popen(["bash"], stdin=subprocess.PIPE)
while True:
    data = os.read(0, 65536)
    if not data:
        break
    shell.stdin.write(data)
    shell.stdin.flush()
    time.sleep(len(data) / float(sys.argv[1]))
shell.stdin.close()
shell.wait()
'''


@pytest.mark.parametrize('many', [False, True])
def test_a_terminal_gets_a_progress_line_and_a_pipe_none(tmp_path, many):
    source, there = option_source(tmp_path)
    if many:
        for n in range(1200):
            write(str(source / ('f%d' % n)), os.urandom(6000))
    else:
        write(str(source / 'large'), os.urandom(7_000_000))
    words = ['--no-replicate-on-change', source, there.parent, sys.executable, '-c', OPTION_SLOW, '4e6']
    status, out, seen = option_on_terminal(words)
    assert status == 0 and not difference(str(source), str(there))
    progress = re.findall(r'\r([\d,]+) of ([\d,]+) paths, ([\d.]+) of ([\d.]+) MB, ([\d.]+) MB/s, '
                          r'(\d+) s left\033\[K', seen)
    assert progress, seen
    for done, paths, megabytes, all_of_them, rate, left in progress:
        assert int(done.replace(',', '')) <= int(paths.replace(',', ''))
        assert float(megabytes) <= float(all_of_them) + 0.01
        assert float(rate) < 60 and int(left) < 60
    assert seen.endswith('\r\033[K')            # nothing of it is left at the end
    assert '\r' not in out and '\033' not in out
    shutil.rmtree(str(there))
    piped = once(*words)
    assert piped.stderr == '' and '\r' not in piped.stdout
    if not many:
        shutil.rmtree(str(there))
        assert 'MB/s' not in option_on_terminal(['--quiet', *words])[2]


@pytest.mark.parametrize('env, coloured', [({}, True), ({'NO_COLOR': '1'}, False)])
def test_colour_is_only_on_a_terminal_and_never_with_no_color(tmp_path, env, coloured):
    source, there = option_source(tmp_path, 'a')
    os.mkfifo(str(source / 'fifo'))
    words = ['--no-replicate-on-change', source, there.parent, 'bash']
    _, out, seen = option_on_terminal(words, env)
    assert 'fifo' in seen and ('\033[33m' in seen) == coloured and '\033' not in out
    assert '\033' not in once(*words).stderr


FAULT_ENDS_AT = '''
at = os.path.dirname(os.path.abspath(sys.argv[0]))
if os.path.exists(os.path.join(at, 'ended')):
    os.execvp(sys.argv[2], sys.argv[2:])
open(os.path.join(at, 'ended'), 'w').close()
far = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE, bufsize=0)
while True:
    data = os.read(0, 65536)
    if not data or b'\\n' + sys.argv[1].encode() + b' ' in b'\\n' + data:
        far.kill()
        os._exit(9)
    far.stdin.write(data)
'''


def fault_ends_at(tmp_path, verb, *far):
    """A connection command that ends, the first time, just before a record of this kind is received."""
    return [fault_python(tmp_path / 'ends', 'relay', FAULT_ENDS_AT), verb, *far]


def test_a_replica_that_is_being_cleaned_out_when_the_connection_ends_is_cleaned_out_after_it(tmp_path):
    source, there = option_source(tmp_path, 'f')
    for number in range(300):
        write(str(there / ('%d.o' % number)))
        write(str(there / ('.git/%d' % number)))
    done = once('--clean-out-first', '--exclude', '*.o', '--no-replicate-on-change', source, there.parent,
                *fault_ends_at(tmp_path, 'remove', 'bash'))
    assert 'connected again' in done.stderr and option_paths(there) == ['f']


@pytest.mark.parametrize('watch', [True, False])
def test_a_remote_hook_that_a_lost_connection_kept_from_running_runs_after_it(tmp_path, watch):
    source, there = option_source(tmp_path, 'f', 'g')
    words, read = option_hook(tmp_path, '--remote-hook')
    words = [*words, source, there.parent, *fault_ends_at(tmp_path, 'hook', 'bash')]
    if watch:
        with Running(tmp_path, *words) as running:
            until(read, 10, running.log)
    else:
        once('--no-replicate-on-change', *words)
    assert [sorted(paths) for paths in read()] == [['f', 'g']]


@pytest.mark.parametrize('far', ['bash', 'dash', 'busybox sh'])
def test_a_remote_hook_that_ends_its_connection_runs_once(tmp_path, far):
    source, there = option_source(tmp_path)
    write(str(source / 'f'), mtime_ns=10**18)       # else it may be so fresh that it is sent again
    once('--no-replicate-on-change', '--remote-hook', 'echo >>../runs; kill -9 $PPID', source, there.parent,
         *shell_command(tmp_path, far), timeout=20)
    assert (tmp_path / 'there/runs').read_bytes() == b'\n'


def test_a_remote_hook_that_ends_its_connection_runs_once_though_that_is_told_late(tmp_path):
    source, there = option_source(tmp_path, 'f')
    late = fault_python(tmp_path / 'late', 'relay', """
far = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
os.close(0)
for data in iter(lambda: os.read(far.stdout.fileno(), 65536), b''):
    time.sleep(0.3)
    os.write(1, data)
""")
    words = '--remote-hook', 'cat >>../runs; kill -9 $PPID', source, there.parent, late, 'bash'
    with Running(tmp_path, *words) as running:
        until(lambda: (tmp_path / 'there/runs').exists(), 10, running.log)
        write(str(source / 'g'))        # so that something is written where nobody reads any more
        until(lambda: fault_holds(str(there), 'g', b''), 10, running.log)
        until(lambda: b'g\0' in (tmp_path / 'there/runs').read_bytes(), 10, running.log)
    assert (tmp_path / 'there/runs').read_bytes() == b'f\0g\0'


def test_what_a_remote_hook_prints_is_shown_as_it_is(tmp_path):
    option_source(tmp_path, 'f')
    said = ['main.c: 12: undefined x', 'run.sh: line 3: oops', 'backup: time stamp 17:00', '1+0 records in']
    done = option_once(tmp_path, '--remote-hook', 'printf "%s\\n" ' + ' '.join(map(shlex.quote, said)))
    assert all(line in done.stderr for line in said), done.stderr
    write(str(tmp_path / 'src/f'), 'more')
    done = option_once(tmp_path, '--remote-hook', 'printf "no newline"; exit 3')
    assert 'no newline; it ended with status 3' in done.stderr


def test_of_a_remote_hook_that_never_stops_talking_the_last_lines_are_shown(tmp_path):
    option_source(tmp_path, 'f')
    done = option_once(tmp_path, '--remote-hook', 'yes talk | head -n 300000; head -c 8000000 /dev/zero; echo; echo end')
    assert done.stderr.rstrip().endswith('; end') and done.stderr.count('talk') < 2000, done.stderr[-1000:]


def test_without_initial_replication_a_change_of_the_mode_sends_what_was_never_the_same(tmp_path):
    source, there = option_source(tmp_path)
    write(str(source / 'f'), 'AAAA')
    write(str(there / 'f'), 'BBBB', mtime_ns=10**18)
    with option_watching(tmp_path, '--no-initial-replication') as running:
        os.chmod(str(source / 'f'), 0o600)
        until_equal(str(source), str(there), 10, running=running)


def test_without_initial_replication_what_changes_while_no_connection_can_be_made_is_sent(tmp_path):
    source, there = option_source(tmp_path, 'f', 'y.x')
    write(str(there / 'f'), 'old')
    far = fault_command(tmp_path / 'far', 'command', '#!/bin/sh\n[ ! -e %s/down ] || { echo >%s/tried; exit 1; }\nexec dash\n'
                        % (tmp_path, tmp_path))
    with Running(tmp_path, '--no-initial-replication', source, there.parent, far) as running:
        write(str(tmp_path / 'down'))
        running.cut()
        write(str(tmp_path / 'new'), 'edited', mtime_ns=10**18)
        os.rename(str(tmp_path / 'new'), str(source / 'f'))
        write(str(source / '.gitignore'), '*.x\n')          # has everything looked at before the next connection
        for _ in range(2):
            until(lambda: os.path.exists(str(tmp_path / 'tried')), 20, running.log)
            os.remove(str(tmp_path / 'tried'))
        os.remove(str(tmp_path / 'down'))
        until(lambda: fault_holds(str(there), 'f', b'edited'), 20, running.log)


def test_mirror_keeps_an_empty_directory_that_is_left_out(tmp_path):
    source, there = option_source(tmp_path, 'f', 'sub/')
    for name in ('build', 'sub/data', 'gone'):
        os.makedirs(str(there / name))
    option_once(tmp_path, '--mirror', '--exclude', '/build/', '--exclude', 'sub/data/')
    assert option_paths(there) == ['build', 'f', 'sub', 'sub/data']


def test_nohup_keeps_it_running(tmp_path):
    source, there = option_source(tmp_path, 'f')
    with open(str(tmp_path / 'out'), 'wb') as out:
        process = subprocess.Popen(['nohup', *command(source, there.parent, 'bash')], stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=subprocess.STDOUT)
    try:
        until(lambda: option_has(there, 'f'), 20)
        process.send_signal(signal.SIGHUP)
        write(str(source / 'g'))
        until(lambda: option_has(there, 'g'), 10)
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(5) == 0


def test_a_current_directory_that_is_gone_is_no_traceback(tmp_path):
    source, there = option_source(tmp_path, 'f')
    gone = tmp_path / 'gone'
    gone.mkdir()
    text = 'cd %s; rmdir %s; exec "$@"' % (gone, gone)
    for place, status in ((source, 0), ('src', 2)):
        words = command('--no-replicate-on-change', place, there.parent, 'bash')
        done = subprocess.run(['sh', '-c', text, 'sh', *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=30)
        assert done.returncode == status and b'Traceback' not in done.stderr, done
        gone.mkdir()
    assert b'current directory' in done.stderr and option_has(there, 'f')


def test_once_is_over_though_a_large_file_is_written_all_the_time(tmp_path):
    source, there = option_source(tmp_path, 'f')
    write(str(source / 'log'), bytes(4 << 20))
    writer = subprocess.Popen([sys.executable, '-c', 'import sys, time\nfile = open(sys.argv[1], "ab", 0)\nwhile True:\n'
                               '    file.write(b"line\\n")\n    time.sleep(0.002)\n', str(source / 'log')])
    try:
        option_once(tmp_path, timeout=15)
    finally:
        writer.kill()
        writer.wait()
    assert option_has(there, 'f') and os.path.getsize(str(there / 'log')) >= 4 << 20


@pytest.mark.parametrize('options', ['--no-replicate-on-change', ''])
def test_a_closed_pipe_ends_it_without_noise(tmp_path, options):
    source, there = option_source(tmp_path, *('f%d' % n for n in range(300)))
    words = ' '.join(map(shlex.quote, command(*options.split(), source, there.parent, 'bash')))
    done = subprocess.run([need('bash'), '-c', '%s | head -1; echo "${PIPESTATUS[0]}"' % words],
                          stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30)
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 2 and lines[0].startswith('sent ') and lines[1] == '0' and done.stderr == b'', done


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_an_output_that_nobody_reads_from_the_start_ends_it_without_noise(tmp_path, unbuffered):
    """Python writes what it still holds once more at its end."""
    source, there = option_source(tmp_path, 'a')
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(command(source, there.parent, 'bash'), stdin=subprocess.DEVNULL, stdout=theirs,
                          stderr=subprocess.PIPE, timeout=30, env=dict(os.environ, PYTHONUNBUFFERED=unbuffered))
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b'')


@pytest.mark.parametrize('redirection', ['>&-', '2>&-', '>&- 2>&-', '>/dev/full', '2>/dev/full', '<&-'])
def test_closed_and_full_outputs_are_no_traceback(tmp_path, redirection):
    source, there = option_source(tmp_path, 'a')
    os.mkfifo(str(source / 'fifo'))
    words = ' '.join(map(shlex.quote, command('--no-replicate-on-change', source, there.parent, 'bash')))
    done = subprocess.run(['bash', '-c', words + ' ' + redirection], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=30)
    assert b'Traceback' not in done.stderr and b'Exception' not in done.stderr, done.stderr.decode()
    assert option_has(there, 'a')


@pytest.mark.parametrize('option', ['--receiver', '--help', '--version'])
@pytest.mark.parametrize('redirection, said', [('| true', b''), ('>/dev/full', b'No space left on device')])
def test_what_is_printed_is_no_traceback_where_nobody_reads_it(option, redirection, said):
    done = subprocess.run(['bash', '-c', ' '.join(command(option)) + ' ' + redirection], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=30)
    assert said in done.stderr and done.stderr.count(b'\n') == bool(said), done.stderr.decode()


def test_ctrl_c_while_the_program_is_still_loading_is_no_traceback(tmp_path):
    shutil.copy(os.path.join(HERE, 'file_replicator.py'), str(tmp_path))
    write(str(tmp_path / 'argparse.py'), 'import os\nos.kill(os.getpid(), 2)\n')      # comes first: it is beside it
    done = subprocess.run([sys.executable, str(tmp_path / 'file_replicator.py'), '--help'], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (-2, b'', b'')


def test_a_wrong_command_line_is_status_2_also_where_nobody_reads_why():
    assert subprocess.run(['bash', '-c', ' '.join(command('one')) + ' 2>/dev/full'], timeout=30).returncode == 2


@pytest.mark.parametrize('words, said', [
    (['no-such-command-anywhere'], 'cannot run no-such-command-anywhere: No such file or directory'),
    (['/etc/passwd'], 'Permission denied'),
    (['sh', '-c', 'echo its own words >&2; exit 127'], 'status 127: its own words (a command was not found'),
    (['sh', '-c', 'echo its own words; exit 126'], 'status 126: its own words (a command could not be run'),
    (['sh', '-c', 'echo no such container >&2; exit 125'], 'no such container (docker itself refused'),
    (['sh', '-c', 'for w in no "such " "container: " "a "b; do printf "$w" >&2; sleep .02; done; exit 125'],
     'status 125: nosuch container: a b (docker itself refused'),
    (['sh', '-c', 'echo Connection refused >&2; exit 255'],
     'Connection refused (ssh could not connect or log in'),
    (['sh', '-c', 'exit 77'], 'ended with status 77'),
    (['sh', '-c', 'kill -9 $$'], 'killed by signal 9'),
    (['true'], 'it is no shell, or has nothing on its standard input'),
    (['cat'], 'no shell: it gives back what it is sent'),
    (['yes'], 'no shell: it says too much, and nothing that was asked'),
    (['cat', '/dev/zero'], 'no shell: it says too much, and nothing that was asked'),
    (['bash', '-c', 'exec >&-; sleep 3'], 'closed its output'),
    (['sh', '-c', 'printf "\\033[31mred\\377" >&2; exit 1'], '\\x1b[31mred'),
])
def test_a_first_connection_that_fails_says_what_the_command_said_and_what_it_may_mean(tmp_path, words, said):
    source, there = option_source(tmp_path, 'a')
    done = once(source, there.parent, *words, expect=1)
    assert said in done.stderr and '--wait' in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert '\033' not in done.stderr and done.stdout == ''


def test_no_shell_that_answers_is_given_up_in_the_end(tmp_path, monkeypatch):
    source, there = option_source(tmp_path, 'a')
    monkeypatch.setattr(fr, 'READY_SECONDS', 1)
    words = ['sh', '-c', 'echo Password: >&2; exec sleep 20']
    with pytest.raises(fr.Stop, match='no shell answered within 1 seconds: Password:.*--wait'):
        fr.replicate(fr.parse([str(source), str(there.parent), *words]))


@pytest.mark.parametrize('where, said', [('/dev/null', 'directory'), ('/proc', 'directory')])
def test_a_destination_that_cannot_be_is_said_with_the_far_sides_reason(tmp_path, where, said):
    source, there = option_source(tmp_path, 'a')
    done = once(source, where, 'bash', expect=1)
    assert said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_help_is_grouped_and_each_option_has_its_default_or_its_unit(tmp_path):
    done = once('--help')
    assert done.stderr == ''
    groups = [line[:-1] for line in done.stdout.splitlines() if re.match(r'\S.*:$', line)]
    assert [word for word in ('what', 'when', 'after', 'words')
            if not any(each.startswith(word) for each in groups)] == []
    parser = fr.make_parser()
    lacking = []
    for action in parser._actions:
        name = action.option_strings[0]
        assert name in done.stdout and action.help
        no_default = name.startswith('--no-') or name in ('--help', '--version', '--receiver')
        if not no_default and 'default' not in action.help:
            lacking.append(name)
    assert not lacking
    assert max(map(len, done.stdout.splitlines())) <= 110
    assert once('--version').stdout == 'file_replicator %s\n' % fr.__version__
    assert once('--receiver').stdout == fr.RECEIVER


# ---- what stands in the place of something else

def number_of(tree):
    """What each file of a tree is: the number it has here, which stays with its bytes."""
    return {path: entry.inode for path, entry in tree.entries.items() if entry.kind == 'f'}


@pytest.mark.parametrize('moves', [[('a', 't'), ('b', 'a'), ('t', 'b')], [('a', 'old'), ('b', 'a')],
                                   [('a/f', 'a/t'), ('b/f', 'a/f'), ('a/t', 'b/f')], [('a', 'b/a'), ('b', 'a')]])
def test_files_that_were_made_at_once_are_told_apart_though_their_directories_changed_places(moves):
    """Size and all times are the same: a rename of a directory changes none in it."""
    remote = fr.Tree()
    for number, path in enumerate(['', 'a', 'b', 'a/f', 'b/f', 'a/g', 'b/g']):
        kind = 'f' if path[1:] else 'd'
        remote.put(path, fr.Entry(kind, 0o755, 4 * (kind == 'f'), 10**18, '', (1, number), 10**18))
    local, there = copy_tree(remote), number_of(remote)
    for old, new in moves:
        local.move(old, new)
        for path in (new, fr.parent(new), fr.parent(old)):
            if local.get(path) is not None:
                local.put(path, local.get(path)._replace(ctime_ns=2 * 10**18))
    for step in fr.plan(remote, local, all_paths(remote, local)):
        if step.verb == 'move':
            for path in [path for path in there if (path + '/').startswith(step.detail + '/')]:
                there[step.path + path[len(step.detail):]] = there.pop(path)
        elif step.verb == 'file':
            there[step.path] = step.entry.inode
        elif step.verb == 'remove':
            there.pop(step.path, None)
    assert there == number_of(local)


@pytest.mark.parametrize('made_ns, moved', [(99, True), (100, True), (101, False)])
@pytest.mark.parametrize('kind', ['f', 'd'])
def test_what_was_made_after_something_else_went_is_no_rename_though_it_got_its_number(made_ns, moved, kind):
    remote, local = fr.Tree(), fr.Tree()
    for tree, path, ctime_ns in ((remote, 'a', 100), (local, 'b', 200)):
        tree.put('', fr.Entry('d', 0o755, 0, 10**18, '', (1, 1), 1))
        tree.put(path, fr.Entry(kind, 0o755, 0, 10**18, '', (1, 7), ctime_ns))
    steps = fr.plan(remote, local, all_paths(remote, local), made_ns=lambda path: made_ns)
    assert ('move' in [step.verb for step in steps]) == moved
    remote.put('b', remote.get('b')._replace(ctime_ns=100))
    steps = fr.plan(remote, local, {'b': fr.LOOK}, made_ns=lambda path: made_ns)
    assert [step.verb for step in steps if step.verb != 'meta'] == ['file'] * (kind == 'f' and not moved)


@pytest.mark.parametrize('options', [[], ['--poll', '0.1']])
def test_what_got_the_number_of_what_is_gone_is_sent_though_size_and_time_are_the_same(tmp_path, options):
    """As packages are unpacked, whose files all have one time. ext4 gives numbers to others at once, tmpfs never does."""
    source, there = option_source(tmp_path, 'pack/')
    aside = tmp_path / 'aside'

    def make(path, text):
        write(str(path), text, mtime_ns=10**18)

    for name in ('pack/f', 'one', 'two'):
        make(source / name, '0000')
    with option_watching(tmp_path, *options) as running:
        for number in range(1, 6):
            text = '%04d' % number
            shutil.rmtree(str(source / 'pack'))
            make(source / 'pack/f', text)
            os.unlink(str(source / 'one'))
            make(aside / 'one', text)
            os.rename(str(aside / 'one'), str(source / 'one'))
            for name in os.listdir(str(source)):
                if name.startswith('two'):
                    os.unlink(str(source / name))
            make(aside / 'two', text)
            os.rename(str(aside / 'two'), str(source / ('two%d' % number)))
            until(lambda: all(fault_holds(str(there), name, text.encode()) for name in ('pack/f', 'one', 'two%d' % number)),
                  5, running.log)


def test_a_directory_that_got_the_number_of_one_that_is_gone_is_not_taken_for_it(tmp_path):
    source, there = option_source(tmp_path, 'old/f')
    with option_watching(tmp_path, '--exclude', 'keep') as running:
        for name in ('keep', 'theirs'):
            write(str(there / 'old' / name), name)
        shutil.rmtree(str(source / 'old'))
        write(str(source / 'new/f'), 'new')
        until(lambda: option_has(there, 'new/f'), 10, running.log)
        running.in_step()
    assert option_paths(there) == ['new', 'new/f', 'old', 'old/keep', 'old/theirs']


@pytest.mark.parametrize('options, lost', [(['--poll', '0.2'], False), ([], True)])
def test_bytes_that_changed_in_place_and_kept_size_and_time_arrive_though_no_event_tells(tmp_path, options, lost):
    source, there = option_source(tmp_path, 'f')
    write(str(source / 'f'), 'A' * 1000, mtime_ns=10**18)
    with contextlib.ExitStack() as stack:
        with kernel_setting(QUEUE, 16) if lost else contextlib.nullcontext():
            running = stack.enter_context(option_watching(tmp_path, *options))
        os.kill(running.process.pid, signal.SIGSTOP)
        for number in range(40):
            write(str(source / ('x%d' % number)))
        with open(str(source / 'f'), 'r+') as file:
            file.write('B' * 1000)
        os.utime(str(source / 'f'), ns=(10**18, 10**18))
        os.kill(running.process.pid, signal.SIGCONT)
        until(lambda: fault_holds(str(there), 'f', b'B' * 1000), 10, running.log)


def test_another_time_within_the_same_second_is_set(tmp_path):
    source, there = option_source(tmp_path, 'f')
    os.utime(str(source / 'f'), ns=(10**18, 10**18))
    with option_watching(tmp_path) as running:
        os.utime(str(source / 'f'), ns=(10**18, 10**18 + 250000000))
        until_equal(str(source), str(there), 5, running=running)


@pytest.mark.parametrize('unit', [100, 10**6, 10**9])
def test_a_file_system_that_rounds_times_down_is_not_sent_everything_again(unit):
    here = 10**18 + 123456789
    assert fr.same_time(here // unit * unit, here) and not fr.same_time(here // unit * unit + 1, here)
    assert not fr.same_time(here, here // unit * unit) and not fr.same_time(here // unit * unit - unit, here)


# ---- what is mounted over there, and what rules there

@fault_in_each_shell
def test_a_link_is_never_read_into_a_file_that_is_a_mount_point(fault_open, shell):
    tmp, source, replica = fault_open, fault_open + '/src', fault_open + '/far/src'
    write(tmp + '/secret', 'secret')
    write(tmp + '/outer', 'mounted', 0o666)
    write(source + '/file', 'in place', 0o600)
    os.symlink(tmp + '/secret', source + '/link')
    for name in ('file', 'link'):
        write(replica + '/' + name)
    write(tmp + '/other', 'other', 0o666)
    with fault_mount(replica + '/link', '--bind', tmp + '/outer'), fault_mount(replica + '/file', '--bind', tmp + '/other'):
        done = once('--no-replicate-on-change', source, tmp + '/far', *shell_command(tmp, shell), expect=1)
        assert re.search('file_replicator: link: .*[Bb]usy', done.stderr)
    assert open(tmp + '/outer').read() == 'mounted'
    assert open(tmp + '/other').read() == 'in place' and os.stat(tmp + '/other').st_mode & 0o777 == 0o600


@fault_in_each_shell
def test_what_is_mounted_is_known_in_a_replica_of_any_name(fault_open, shell):
    """In /proc/mounts blanks, tabs, newlines and backslashes are written in octal."""
    tmp, far = fault_open, fault_open + '/a b\tc\nd\\e'
    source = tmp + '/src'
    write(source + '/f')
    write(tmp + '/theirs/precious')
    os.makedirs(far + '/src/m n')
    with fault_mount(far + '/src/m n', '--bind', tmp + '/theirs'):
        once('--mirror', '--no-replicate-on-change', source, far, *shell_command(tmp, shell))
        assert os.path.exists(tmp + '/theirs/precious') and os.path.exists(far + '/src/f')


def test_what_we_put_below_a_mount_point_goes_though_it_was_removed_while_there_was_no_connection(fault_open):
    tmp, source, there = fault_open, fault_open + '/src', fault_open + '/far/src'
    for name in ('m/ours', 'm/kept', 'a'):
        write(source + '/' + name)
    write(tmp + '/theirs/precious')
    os.makedirs(there + '/m')
    with fault_mount(there + '/m', '--bind', tmp + '/theirs'), Running(tmp, '--mirror', source, tmp + '/far', 'dash') as running:
        running.process.send_signal(signal.SIGSTOP)
        for pid in running.connections():
            os.kill(pid, signal.SIGKILL)
        os.unlink(source + '/m/ours')
        running.process.send_signal(signal.SIGCONT)
        running.in_step(2)
        assert sorted(os.listdir(tmp + '/theirs')) == ['kept', 'precious']


def test_a_file_that_is_replaced_within_a_second_is_sent_though_times_here_are_whole_seconds(fault_open):
    tmp, source, far = fault_open, fault_open + '/here/src', fault_open + '/far'
    with open(tmp + '/image', 'wb') as image:
        image.truncate(8 << 20)
    subprocess.run([need('mkfs.ext4'), '-q', '-F', '-I', '128', tmp + '/image'], stderr=subprocess.DEVNULL, check=True)
    os.makedirs(tmp + '/here')
    os.mkdir(far)
    fault_root()
    subprocess.run(['mount', '-o', 'loop', tmp + '/image', tmp + '/here'], check=True)
    write(source + '/f', 'first')
    with Running(tmp, '--no-gitignore', source, far, 'dash') as running:
        for number in range(4):
            until(lambda: time.time() % 1 < 0.2, 5)     # early in a second
            write(source + '/f', 'a%d' % number)
            until_equal(source, far + '/src', 5, running=running)
            write(source + '/new', 'b%d' % number)
            os.rename(source + '/new', source + '/f')
            until_equal(source, far + '/src', 5, running=running)


def test_a_directory_in_which_nothing_can_be_renamed_or_removed_keeps_nothing_else(tmp_path):
    """As one that may only be appended to."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/a/f', 'first')
    os.mkdir(far)
    connect = shell_command(tmp_path, 'dash')
    for tool in ('mv', 'rm'):
        fault_command(tmp_path / 'shims-dash', tool, '#!/bin/sh\ncase "$*" in *a/.file_replicator*-new*)\n'
                      '[ -e %s ] || { echo not here; exit 1; } ;; esac\nexec %s "$@"\n' % (tmp_path / 'mended', need(tool)))
    with Running(tmp_path, source, far, *connect, wait=False) as running:
        running.says('not in step')
        write(source + '/z', 'later')
        until(lambda: fault_holds(far, 'src/z', b'later'), 10, running.log)
        write(source + '/a/f', 'then')
        running.says('a/f: not here')
        write(str(tmp_path / 'mended'))
        until_equal(source, far + '/src', 30, running=running)
        assert 'connection lost' not in running.err()


@pytest.mark.parametrize('change', ['echo new >f', 'rm f', 'rm f; ln -s g f', 'mv g f'])
def test_with_mirror_a_directory_that_came_to_stand_where_a_file_of_ours_did_goes_with_all_in_it(tmp_path, change):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for name in ('f', 'g'):
        write(source + '/' + name, name)
    os.mkdir(far)
    with Running(tmp_path, '--mirror', source, far, 'dash') as running:
        os.unlink(far + '/src/f')
        write(far + '/src/f/theirs')
        subprocess.run(['sh', '-c', change], cwd=source, check=True)
        until_equal(source, far + '/src', 10, running=running)


@pytest.mark.parametrize('change', ['echo t >far/src/new/theirs; echo f >src/new', 'echo t >far/src/d/theirs; rm -r src/d; echo f >src/d',
                                    'echo f >src/out; : >src/.gitignore'])
def test_with_mirror_a_directory_that_was_never_listed_makes_way_while_we_watch(tmp_path, change):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for path in (source + '/d/f', source + '/.gitignore', far + '/src/out/theirs'):
        write(path, 'out\n')
    with Running(tmp_path, '--mirror', source, far, 'dash') as running:
        os.mkdir(far + '/src/new')
        subprocess.run(['sh', '-c', change], cwd=str(tmp_path), check=True)
        until(lambda: any(os.path.isfile(os.path.join(far, 'src', name)) for name in ('new', 'd', 'out')), 10, running.log)
        until(lambda: running.out().endswith('in step\n'), 10, running.log)
        assert running.err().count('comparing again') == 1


def test_with_mirror_what_git_leaves_out_in_a_directory_in_the_way_is_compared_once_and_stays(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/d/f')
    write(source + '/.gitignore', '*.db\n')
    os.mkdir(far)
    with Running(tmp_path, '--mirror', source, far, 'dash') as running:
        for name in ('theirs', 'kept.db'):
            write(far + '/src/d/' + name)
        shutil.rmtree(source + '/d')
        write(source + '/d', 'a file')
        running.says('not in step')
        write(source + '/d', 'another')         # is tried again
        write(source + '/z')
        until(lambda: os.path.exists(far + '/src/z'), 10, running.log)
        assert os.listdir(far + '/src/d') == ['kept.db']
        assert running.err().count('comparing again') == 1
        os.unlink(far + '/src/d/kept.db')
        until(lambda: fault_holds(far, 'src/d', b'another'), 40, running.log)


def test_a_directory_whose_mode_and_time_cannot_be_set_is_named_once(tmp_path):
    source, far, stuck = str(tmp_path / 'src'), str(tmp_path / 'far'), str(tmp_path / 'stuck')
    write(source + '/a/f', 'first')
    os.mkdir(far)
    connect = shell_command(tmp_path, 'dash')
    for tool in ('chmod', 'touch'):
        fault_command(tmp_path / 'shims-dash', tool, '#!/bin/sh\ncase "$*" in *" ./a"*) [ ! -e %s ] || { echo not %s; exit 1; } ;; esac\n'
                      'exec %s "$@"\n' % (stuck, tool, need(tool)))
    with Running(tmp_path, '--debugging', source, far, *connect) as running:
        write(stuck)
        os.chmod(source + '/a', 0o750)
        for number in range(4):
            write(source + '/a/f', 'number %d' % number)
            until(lambda: fault_holds(far, 'src/a/f', b'number %d' % number), 10, running.log)
        until(lambda: len(re.findall(r'answer \d+ 1', running.err())) > 6, 20, running.log)
        assert running.err().count('a: its mode or time could not be set') == 1
        os.unlink(stuck)
        until_equal(source, far + '/src', 40, running=running)


def test_a_far_tar_that_loses_times_is_not_used(tmp_path):
    """As GNU's does on a FUSE file system that ignores one of two times."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    for number in range(5):
        write('%s/%d' % (source, number), mtime_ns=10**18)
    os.mkdir(far)
    connect = shell_command(tmp_path, 'dash')
    fault_command(tmp_path / 'shims-dash', 'tar', '#!/bin/sh\n%s "$@" || exit\n[ "$1" != xpof ] || find . -type f -exec touch {} +\n'
                  % need('tar'))
    once('--no-replicate-on-change', source, far, *connect)
    assert not difference(source, far + '/src')


@pytest.mark.parametrize('shell', ['bash', 'dash', 'mksh'])
def test_where_no_mode_can_be_set_the_bytes_arrive_and_the_modes_are_named(tmp_path, shell):
    """busybox's mkdir makes the directory and fails then."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    write(source + '/d/f', 'data', 0o755)
    os.mkdir(far)
    connect = shell_command(tmp_path, shell)
    shims = tmp_path / ('shims-' + shell)
    fault_command(shims, 'chmod', '#!/bin/sh\necho not here; exit 1\n')
    fault_command(shims, 'mkdir', '#!/bin/sh\ncase $1 in -m) shift 2; %s "$@"; echo not here; exit 1 ;; esac\nexec %s "$@"\n'
                  % (need('mkdir'), need('mkdir')))
    done = once('--no-replicate-on-change', source, far, *connect, expect=1)
    assert 'd/f: its mode or time could not be set: not here' in done.stderr
    assert fault_holds(far, 'src/d/f', b'data')


def fault_default_acl(directory):
    """What is made in a directory may be written by its group and read by others, whatever the umask."""
    entries = ((1, 7), (4, 7), (0x20, 5))       # the owner, the group, others
    acl = struct.pack('<I', 2) + b''.join(struct.pack('<HHI', tag, bits, 0xffffffff) for tag, bits in entries)
    try:
        os.setxattr(str(directory), 'system.posix_acl_default', acl)
    except OSError:
        pytest.skip('no ACLs here')


@fault_in_each_shell
def test_a_default_acl_over_there_opens_nothing(tmp_path, shell):
    """A umask means nothing where one rules: g::rwx as the group of a web server has it."""
    source, there = str(tmp_path / 'src'), str(tmp_path / 'far/src')
    os.makedirs(there)
    fault_default_acl(there)
    for name, mode in (('secret', 0o600), ('run', 0o700), ('plain', 0o644), ('large', 0o640)):
        write(source + '/' + name, FAULT_BIG if name == 'large' else name, mode)
    os.mkdir(source + '/closed', 0o700)
    with Running(tmp_path, source, str(tmp_path / 'far'), *shell_command(tmp_path, shell)) as running:
        until_equal(source, there, running=running)
        write(source + '/later', 'later', 0o600)
        write(source + '/large2', FAULT_BIG, 0o600)
        os.mkdir(source + '/closed2', 0o700)
        for number in range(9):
            write(source + '/many/%d' % number, 'many', 0o600 + 0o40 * (number % 2))
        until_equal(source, there, running=running)


@fault_in_each_shell
def test_what_cannot_be_made_where_a_default_acl_rules_is_named_and_keeps_nothing_else(fault_open, tmp_path, shell):
    source, far = fault_open + '/src', fault_open + '/far'
    for name in ('closed/file', 'after'):
        write(source + '/' + name)
    os.makedirs(far + '/src/closed')
    fault_give(far, far + '/src')
    fault_default_acl(far + '/src')
    with Running(tmp_path, source, far, *fault_other_user(fault_open, shell), wait=False) as running:
        running.says('not in step')
        assert 'file_replicator: closed/file: ' in running.err()
        write(source + '/later')
        until(lambda: os.path.exists(far + '/src/after') and os.path.exists(far + '/src/later'), 10, running.log)
        assert 'connection lost' not in running.err()


@pytest.mark.parametrize('directory', ['', 'd'])
def test_a_directory_that_is_closed_to_others_is_closed_before_anything_comes_into_it(tmp_path, directory):
    source, there = tmp_path / 'src', tmp_path / 'far/src'
    for number in range(5):
        write(str(source / directory / str(number)), 'secret', 0o644)
    (source / directory).chmod(0o700)
    (there / directory).mkdir(parents=True)
    (there / directory).chmod(0o755)
    done = once('--no-replicate-on-change', '--debugging', source, there.parent, 'bash')
    records = re.findall(r'record (\w+) \d+ \d+ (\w+)', done.stderr)
    assert ('meta', '00700') in records and records.index(('meta', '00700')) < records.index(('bulk', 'tar'))
    assert not difference(str(source), str(there))


def test_nothing_is_readable_for_a_moment_where_a_default_acl_rules(tmp_path):
    seen = str(tmp_path / 'seen')
    source, there = option_source(tmp_path)
    there.mkdir()
    fault_default_acl(there)
    write(str(source / 'secret'), 'secret', 0o600)
    write(str(source / 'large'), FAULT_BIG, 0o600)
    for tool in ('mv', 'touch'):        # what stands there when one of them begins
        write(str(tmp_path / 'path' / tool), '#!/bin/sh\nfind . -type f -size +0 -perm /077 ! -path "./.file_replicator.*/*" >>%s\n'
              'exec %s "$@"\n' % (seen, need(tool)), 0o755)
    once('--no-replicate-on-change', source, there.parent, 'env', 'PATH=%s:%s' % (tmp_path / 'path', os.environ['PATH']), 'bash', '-c',
         'exec bash')
    assert open(seen).read() == '' and not difference(str(source), str(there))


@fault_in_each_shell
def test_a_directory_that_somebody_made_there_meanwhile_gets_the_mode_it_has_here(tmp_path, shell):
    source, there = option_source(tmp_path, 'f')
    with Running(tmp_path, source, there.parent, *shell_command(tmp_path, shell)) as running:
        os.mkdir(str(there / 'd'))
        os.chmod(str(there / 'd'), 0o777)
        os.mkdir(str(source / 'd'), 0o700)
        until_equal(str(source), str(there), 10, running=running)


def test_of_dev_only_null_is_needed_over_there():
    assert set(re.findall(r'/dev/\w+', fr.RECEIVER)) == {'/dev/null'}


@pytest.mark.parametrize('options, status', [([], 1), (['--wait', '--replicate-on-change'], 0)])
def test_a_find_that_is_killed_over_there_is_not_an_empty_replica(tmp_path, options, status):
    source, there = option_source(tmp_path, 'f')
    write(str(there / 'extra'))
    write(str(tmp_path / 'path/find'), '#!/bin/sh\n[ -e %s/killed ] || case $* in *//%%l*) : >%s/killed; kill -9 $$ ;; esac\n'
          'exec %s "$@"\n' % (tmp_path, tmp_path, need('find')), 0o755)
    words = ['--mirror', *options, source, there.parent, 'env', 'PATH=%s:%s' % (tmp_path / 'path', os.environ['PATH']), 'bash']
    if status:
        done = once('--no-replicate-on-change', *words, expect=1)
        assert 'find, which lists the replica, ended with status 137' in done.stderr and 'in step' not in done.stdout
    else:
        with Running(tmp_path, *words) as running:
            assert option_paths(there) == ['f'], running.log()


# ---- a far disk that is full at the start

def test_on_a_disk_that_is_full_at_the_start_what_is_to_go_goes_and_makes_room(fault_open):
    tmp, source = fault_open, fault_open + '/src'
    write(source + '/f', 'fits')
    with fault_tmpfs(tmp + '/far', 'size=1m'):
        os.mkdir(tmp + '/far/src')
        fault_fill(tmp + '/far/src')
        once('--mirror', '--no-replicate-on-change', source, tmp + '/far', 'bash')
        assert not difference(source, tmp + '/far/src')


def test_a_disk_that_is_full_at_the_start_is_waited_for(fault_open):
    tmp, source = fault_open, fault_open + '/src'
    write(source + '/f', 'fits')
    with fault_tmpfs(tmp + '/far', 'size=1m'):
        write(tmp + '/far/src/keep', 'theirs')
        ballast = fault_fill(tmp + '/far')
        with Running(tmp, source, tmp + '/far', 'bash', wait=False) as running:
            until(lambda: 'No space left' in running.err(), 10, running.log)
            os.remove(ballast)
            until(lambda: fault_holds(tmp + '/far/src', 'f', b'fits'), 20, running.log)


# ---- git, told otherwise or killed

def test_git_that_is_killed_has_not_said_that_nothing_is_ignored(tmp_path):
    source, there = option_source(tmp_path, 'a', 'secret')
    write(str(source / '.gitignore'), 'secret\n')
    git_init(source)
    option_once(tmp_path, env=option_git(tmp_path, 'case $* in *ls-files*) mkdir %s/killed 2>/dev/null && kill -9 $$ ;; esac; %%s'
                                         % tmp_path))
    assert option_paths(there) == ['.gitignore', 'a']


def test_git_that_is_killed_while_it_answers_is_asked_again(tmp_path):
    source, there = option_source(tmp_path, 'a')
    write(str(source / '.gitignore'), 'secret*\n')
    git_init(source)
    with option_watching(tmp_path, env=option_git(tmp_path, 'case $* in *check-ignore*) echo $$ >>%s/pids; exec %s "$@" ;; esac; %%s'
                                                  % (tmp_path, need('git')))) as running:
        for number in range(3):
            write(str(source / ('secret%d' % number)))
            write(str(source / ('new%d' % number)))
            until(lambda: option_has(there, 'new%d' % number), 10, running.log)
            for pid in (tmp_path / 'pids').read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        assert option_paths(there) == ['.gitignore', 'a', 'new0', 'new1', 'new2']


def test_what_the_environment_tells_git_of_its_settings_counts(tmp_path):
    source, there = option_source(tmp_path, 'a', 'secret')
    write(str(tmp_path / 'excludes'), 'secret\n')
    git_init(source)
    option_once(tmp_path, env={'GIT_CONFIG_COUNT': '1', 'GIT_CONFIG_KEY_0': 'core.excludesFile',
                               'GIT_CONFIG_VALUE_0': str(tmp_path / 'excludes')})
    assert option_paths(there) == ['a']


def test_an_edit_need_not_wait_for_git_to_judge_a_thousand_files_one_by_one(tmp_path):
    source, there = option_source(tmp_path, 'a')
    write(str(source / '.gitignore'), '*.o\n')
    git_init(source)
    asked = tmp_path / 'asked'
    with option_watching(tmp_path, env=option_git(tmp_path, 'echo >>%s; %%s' % asked)) as running:
        before = asked.stat().st_size
        os.kill(running.process.pid, signal.SIGSTOP)
        for number in range(1000):
            write(str(source / ('%d.o' % number)))
        write(str(source / 'edit'))
        os.kill(running.process.pid, signal.SIGCONT)
        until(lambda: option_has(there, 'edit'), 10, running.log)
        assert asked.stat().st_size - before < 50
    assert option_paths(there) == ['.gitignore', 'a', 'edit']


def test_with_mirror_git_is_not_started_for_each_thing_that_stands_over_there(tmp_path):
    source, there = option_source(tmp_path, 'a')
    write(str(source / '.gitignore'), '*.o\n/out/\n')
    git_init(source)
    for number in range(300):
        for name in ('kept%d.o', 'extra%d', 'out/%d'):
            write(str(there / (name % number)))
    asked = tmp_path / 'asked'
    option_once(tmp_path, '--mirror', env=option_git(tmp_path, 'echo >>%s; %%s' % asked))
    assert asked.stat().st_size < 20
    assert sorted(os.listdir(str(there))) == sorted(['.gitignore', 'a', 'out', *('kept%d.o' % i for i in range(300))])
    assert len(os.listdir(str(there / 'out'))) == 300


def test_what_is_new_in_a_large_repository_does_not_wait_for_git_to_search_its_index(tmp_path):
    """Without --no-index git takes some milliseconds more for each path, here."""
    source, there = option_source(tmp_path, 'a')
    write(str(source / '.gitignore'), '*.o\n')
    git_init(source)
    blob = os.fsdecode(git(source, 'hash-object', '-w', 'a')).strip()
    many = ''.join('100644 %s\tsome/tracked/%06d\n' % (blob, number) for number in range(200000))
    subprocess.run(['git', 'update-index', '--index-info'], cwd=str(source), input=many.encode(), check=True)
    seconds = []
    with option_watching(tmp_path) as running:
        for name in ('many', 'more'):
            start = time.monotonic()
            for number in range(1000):
                write(str(source / name / str(number)))
            until(lambda: option_has(there, name) and len(os.listdir(str(there / name))) == 1000, 20, running.log)
            seconds.append(time.monotonic() - start)
    assert min(seconds) < 1.2, seconds


def test_rules_that_are_only_in_the_index_count_for_what_comes_later(tmp_path):
    source, there = option_source(tmp_path, 'a', 'd/f')
    write(str(source / 'd/.gitignore'), 'secret\n')
    git_init(source)
    git(source, 'add', '.')
    git(source, 'update-index', '--skip-worktree', 'd/.gitignore')
    os.unlink(str(source / 'd/.gitignore'))
    with option_watching(tmp_path) as running:
        write(str(source / 'd/secret'))
        write(str(source / 'd/later'))
        until(lambda: option_has(there, 'd/later'), 10, running.log)
        assert not option_has(there, 'd/secret')


def test_what_is_new_in_a_submodule_that_is_not_checked_out_is_no_matter_of_the_rules_around_it(tmp_path):
    source, there = option_source(tmp_path, 'a')
    write(str(source / '.gitignore'), '*.o\n')
    git_init(source)
    git(source, 'update-index', '--add', '--cacheinfo', '160000,%040d,sub' % 1)
    os.makedirs(str(source / ('sub/' + 'd/' * 30)))         # some git crashes at such a depth
    with option_watching(tmp_path) as running:
        for name in ('new.o', 'd/' * 30 + 'new.o'):
            write(str(source / 'sub' / name))
            until(lambda: option_has(there, 'sub/' + name), 10, running.log)


def test_with_mirror_what_is_ignored_behind_a_link_here_stays_though_git_crashes(tmp_path):
    """Some git does where a path is deep; what comes after is to be judged as before."""
    source, there = option_source(tmp_path, 'real/f')
    write(str(source / '.gitignore'), '*.o\n')
    git_init(source)
    deep = 'y/' + 'e/' * 32 + 'l3'
    write(str(there / ('l1/' + 'd/' * 28 + 'a.o')))
    write(str(there / deep / 'keep.o'))
    os.symlink('real', str(source / 'l1'))
    os.makedirs(str(source / os.path.dirname(deep)))
    os.symlink('/nowhere', str(source / deep))
    git(source, 'add', '.')
    done = option_once(tmp_path, '--mirror', expect=1)
    assert option_has(there, 'l1/' + 'd/' * 28 + 'a.o', deep + '/keep.o'), done.stdout + done.stderr


@pytest.mark.parametrize('shell', ['dash', 'busybox sh'])
def test_a_directory_that_is_not_ignored_any_more_does_not_keep_the_setgid_bit_it_has_there(tmp_path, shell):
    source, there = option_source(tmp_path, 'b/1')
    write(str(source / '.gitignore'), 'b/\n')
    git_init(source)
    write(str(there / 'b/own'))
    os.chmod(str(there / 'b'), 0o2755)
    with Running(tmp_path, source, there.parent, *shell_command(tmp_path, shell)) as running:
        write(str(source / '.gitignore'), '')
        until(lambda: option_has(there, 'b/1') and running.out().count('in step') == 2, 10, running.log)
        assert stat.S_IMODE(os.stat(str(there / 'b')).st_mode) == stat.S_IMODE(os.stat(str(source / 'b')).st_mode)


def test_what_is_not_ignored_any_more_goes_together_into_the_directory_that_still_stands_there(tmp_path):
    source, there = option_source(tmp_path, 'a', *('out/deep/%d' % number for number in range(300)))
    write(str(source / '.gitignore'), '')
    git_init(source)
    with option_watching(tmp_path, '--debugging') as running:
        write(str(source / '.gitignore'), 'out\n')
        until(lambda: running.out().count('in step') == 2, 10, running.log)
        before = len(re.findall('record file', running.err()))
        write(str(source / 'out/deep/0'), 'another')
        write(str(source / '.gitignore'), '')
        until(lambda: fault_holds(there, 'out/deep/0', b'another'), 10, running.log)
        until(lambda: running.out().count('in step') == 3, 10, running.log)
        assert not difference(str(source / 'out'), str(there / 'out'))
        assert len(re.findall('record file', running.err())) - before < 10
        assert 'record bulk' in running.err()


def test_ignored_paths_of_any_length_are_no_trouble(tmp_path):
    source, there = option_source(tmp_path, 'a')
    write(str(source / '.gitignore'), '*.o\n')
    git_init(source)
    deep = '/'.join(['d' * 240] * 4)
    for number in range(110):
        write(str(source / deep / ('%d%s.o' % (number, 'n' * 240))))
    option_once(tmp_path)
    assert option_has(there, 'a', deep) and not os.listdir(str(there / deep))


def test_where_no_temporary_file_can_be_made_that_is_said(monkeypatch):
    fault_root()
    need('unshare')
    top = tempfile.mkdtemp(dir='/dev/shm')
    try:
        write(top + '/src/f', 'data')
        write(top + '/through', '#!/bin/sh\nfor d in /tmp /var/tmp /usr/tmp; do [ ! -d $d ] || { mount --bind $d $d; '
              'mount -o remount,ro,bind $d; }; done\ncd /proc; exec %s "$@"\n' % sys.executable, 0o755)
        done = subprocess.run(['unshare', '-m', top + '/through', SCRIPT, '--no-replicate-on-change', top + '/src', top + '/far', 'bash'],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={'PATH': os.environ['PATH']})
        assert done.returncode == 1 and b'Traceback' not in done.stderr and b'TMPDIR' in done.stderr, done.stderr
    finally:
        shutil.rmtree(top)


# ---- hooks that are slow, or cannot be told

def test_what_comes_while_a_slow_hook_runs_goes_to_its_next_run_together(tmp_path):
    source, there = option_source(tmp_path, 'f')
    runs = tmp_path / 'runs'
    with option_watching(tmp_path, '--hook', 'tr "\\0" " " >>%s; echo >>%s; sleep 1' % (runs, runs)) as running:
        until(runs.exists, 5, running.log)
        for number in range(10):
            write(str(source / ('%d' % number)))
            until(lambda: option_has(there, str(number)), 5, running.log)
        until(lambda: len(set(runs.read_text().split())) == 11, 10, running.log)
        assert len(runs.read_text().splitlines()) <= 4


def test_a_remote_hook_that_could_not_be_told_is_told_the_next_time(fault_open):
    tmp, source = fault_open, fault_open + '/src'
    write(source + '/x', 'x')
    with fault_tmpfs(tmp + '/far', 'size=300k'):
        with Running(tmp, '--remote-hook', "tr '\\0' ' ' >>%s/told" % tmp, source, tmp + '/far', 'dash') as running:
            until(lambda: os.path.exists(tmp + '/told') and not fault_staging(tmp + '/far'), 10, running.log)
            ballast = fault_fill(tmp + '/far')
            os.rename(source + '/x', source + '/renamed')
            until(lambda: 'remote hook' in running.err(), 10, running.log)
            os.remove(ballast)
            write(source + '/z', 'z')
            until(lambda: 'renamed' in open(tmp + '/told').read(), 10, running.log)


@pytest.mark.parametrize('shell', ['bash', 'dash', 'busybox sh', 'mksh', 'ksh93', 'yash'])
def test_a_remote_hook_has_the_locale_of_the_far_shell(tmp_path, shell):
    source, there = option_source(tmp_path, 'f')
    done = once('--no-replicate-on-change', '--remote-hook', 'echo "LC_ALL=$LC_ALL."', source, there.parent, 'env', 'LC_ALL=C.UTF-8',
                *shell_command(tmp_path, shell))
    assert 'LC_ALL=C.UTF-8.' in done.stderr


# ---- a connection that is made again, or takes long

def test_where_nothing_is_watched_a_new_connection_looks_before_it_says_in_step(tmp_path):
    source, there = option_source(tmp_path, 'f')
    with option_watching(tmp_path, '--poll', '60') as running:
        write(str(source / 'f'), 'changed')
        for pid in running.connections():
            os.kill(pid, signal.SIGKILL)
        until(lambda: running.out().count('in step') > 1, 20, running.log)
        assert fault_holds(str(there), 'f', b'changed')


def test_without_initial_replication_what_changes_while_the_connection_is_made_is_sent(tmp_path):
    source, there = option_source(tmp_path, 'old', 'f')
    there.mkdir()
    with Running(tmp_path, '--no-initial-replication', source, there.parent, 'sh', '-c', 'until [ -e %s/go ]; do sleep 0.1; done; exec bash'
                 % tmp_path, wait=False) as running:
        until(lambda: running.connections(), 10, running.log)
        time.sleep(1)                   # it looked by now: what changes later is the point
        write(str(source / 'f'), 'edited')
        write(str(source / 'new'), 'new')
        write(str(tmp_path / 'go'))
        until(lambda: option_has(there, 'new') and fault_holds(str(there), 'f', b'edited'), 10, running.log)
        running.in_step()
        assert option_paths(there) == ['f', 'new']


def test_without_initial_replication_what_changes_while_the_first_connection_is_waited_for_is_sent(tmp_path):
    source, there = option_source(tmp_path, 'old', 'f')
    option_age(source)                  # what changed within a tick of the first look could have changed since
    there.mkdir()
    with Running(tmp_path, '--wait', '--no-initial-replication', source, there.parent, 'sh', '-c', '[ -e %s/go ] || exit 255; exec bash'
                 % tmp_path, wait=False) as running:
        running.says('waiting for the far side')
        write(str(source / 'f'), 'edited')
        time.sleep(1)                   # some attempts
        write(str(tmp_path / 'go'))
        until(lambda: fault_holds(str(there), 'f', b'edited'), 15, running.log)
        running.in_step()
        assert option_paths(there) == ['f']


@pytest.mark.parametrize('tools', ['the tools of GNU', 'find that prints nothing'])
def test_what_somebody_prints_in_the_midst_of_the_listing_is_no_part_of_it(tmp_path, tools):
    source, there = option_source(tmp_path, 'f')
    write(str(there / 'gone'))
    os.symlink('nowhere', str(there / 'link'))
    far = "sed -u 's/-printf/-no_one/' | bash" if tools.startswith('find') else 'bash'
    far += r" | sed -u '/ \.\/\(gone\|link\)\//a Broadcast message from somebody:'"
    done = once('--mirror', '--no-replicate-on-change', source, there.parent, 'sh', '-c', far)
    assert option_paths(there) == ['f'], done.stdout


def test_what_the_far_side_prints_unasked_does_not_pile_up(tmp_path):
    source, there = option_source(tmp_path, 'f')
    noise = "(until [ -e %s/now ]; do sleep 0.1; done; seq 100000 100999; >%s/done) & exec bash" % (tmp_path, tmp_path)
    with Running(tmp_path, source, there.parent, 'bash', '-c', noise) as running:
        write(str(tmp_path / 'now'))
        until(lambda: option_has(tmp_path, 'done'), 10, running.log)
        write(str(source / 'f'), 'edited')
        running.says('the far side says')
        assert max(map(len, running.log().splitlines())) < 300


def test_no_record_is_so_large_that_a_slow_link_seems_dead(tmp_path):
    """Nothing tells that a link is alive but answers: so until they come, no record is larger than what is sure to
    pass in seconds, if the receiver took one."""
    def first():
        done = once('--debugging', '--no-replicate-on-change', source, there.parent, 'sh', '-c', 'sleep 1; exec bash')
        return int(re.search(r' record .*\\n([1-9]\d*) [0-9a-f]+\\n$', done.stderr, re.M)[1])

    source, there = option_source(tmp_path, 'a', 'b', 'c')
    for name, size in (('a', 250000), ('b', 11000), ('c', 261000)):
        write(str(source / name), os.urandom(size))
    assert first() < 300000
    for path in (source, there):
        with open(str(path / 'large'), 'wb') as file:
            file.truncate(80 << 20)
        os.utime(str(path / 'large'), (1, 1))
    with open(str(source / 'large'), 'r+b') as file:
        file.seek(50 << 20)
        file.write(b'changed')
    assert first() < 300000
    until_equal(str(source), str(there))


def test_a_directory_gets_its_time_once_though_the_backlog_comes_into_it_in_many_records(tmp_path):
    source, there = option_source(tmp_path, *('a/b/%d' % number for number in range(5000)))
    done = once('--debugging', '--no-replicate-on-change', source, there.parent, 'bash')
    assert len(re.findall(r' record bulk ', done.stderr)) > 3
    assert len(re.findall(r' record meta .*\\n\./a/b\\n', done.stderr)) == 1
    until_equal(str(source), str(there))


@pytest.mark.parametrize('seconds', ['0.1', '0.2', '0.3'])
def test_parts_of_a_patch_fall_where_they_belong_whatever_size_a_record_may_have(tmp_path, seconds):
    source, there = option_source(tmp_path)
    for path in (source, there):
        os.makedirs(str(path), exist_ok=True)
        with open(str(path / 'large'), 'wb') as file:
            file.truncate(100 << 20)
        os.utime(str(path / 'large'), (1, 1))
    with open(str(source / 'large'), 'r+b') as file:
        for place in (10**6, 5 * 10**7):
            file.seek(place)
            file.write(os.urandom(10**6))
    once('--no-replicate-on-change', source, there.parent, 'sh', '-c', 'sleep %s; exec bash' % seconds)
    assert not difference(str(source), str(there))


def test_many_tiny_files_are_no_large_record(tmp_path):
    """An archive needs two kilobytes for each, and more for a long name."""
    source, there = option_source(tmp_path, *('%0180d' % number for number in range(200)))
    done = once('--debugging', '--no-replicate-on-change', source, there.parent, 'sh', '-c', 'sleep 2; exec bash')
    assert int(re.search(r' record bulk .*\\n([1-9]\d*) [0-9a-f]+\\n$', done.stderr, re.M)[1]) < 400000
    until_equal(str(source), str(there))


def test_directories_of_files_with_equal_sizes_and_times_change_places_though_they_wait_for_their_turn(tmp_path):
    source, there = option_source(tmp_path, 'blue/', 'green/')

    def made_at_once():
        subprocess.run(['sh', '-c', 'rm -f blue/f green/f; echo blue >blue/f; echo gray >green/f; touch -d @1 blue/f green/f'],
                       cwd=str(source), check=True)
        return os.stat(str(source / 'blue' / 'f')).st_ctime_ns == os.stat(str(source / 'green' / 'f')).st_ctime_ns

    until(made_at_once)
    with option_watching(tmp_path, '--update-interval', '2') as running:
        for old, new in (('blue', 't'), ('green', 'blue'), ('t', 'green')):
            os.rename(str(source / old), str(source / new))
        until_equal(str(source), str(there), running=running)


@pytest.mark.parametrize('first, then', [('mv a/f x', 'mv b/f a/f; mv x b/f'), ('mv a x', 'mv b a; mv x b'), ('mv a x', 'mv b a'),
                                         ('rm -r a', 'mkdir a; echo 3 >a/f; touch -d @1 a/f a')])
@pytest.mark.parametrize('at_once', [True, False])
def test_what_came_where_another_was_about_to_go_when_the_connection_ended_is_sent(tmp_path, first, then, at_once):
    source, there = option_source(tmp_path, 'a/f', 'b/f')
    subprocess.run(['sh', '-c', 'touch -d @1 a/f b/f a b'], cwd=str(source), check=True)
    with option_watching(tmp_path, '--debugging') as running:
        before = len(running.err())
        for pid in running.connections():
            os.kill(pid, signal.SIGSTOP)
        subprocess.run(['sh', '-c', first + (';' + then if at_once else '')], cwd=str(source), check=True)
        until(lambda: re.search(' record (move|remove|file) ', running.err()[before:]), 10, running.log)
        if not at_once:
            subprocess.run(['sh', '-c', then], cwd=str(source), check=True)
        running.cut()
        until_equal(str(source), str(there), running=running)


def test_what_git_leaves_out_over_there_of_a_broken_repository_stays(tmp_path):
    source, there = option_source(tmp_path, 'a')
    write(str(source / '.gitignore'), '*.o\n')
    write(str(source / '.git'), 'gitdir: /nonexistent/of/it\n')
    write(str(there / 'theirs.o'))
    option_once(tmp_path, '--mirror')
    assert option_paths(there) == ['.gitignore', 'a', 'theirs.o']


def test_a_stale_staging_in_a_replica_that_may_not_be_written_is_no_reason_not_to_compare(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    for path in (source, far + '/src'):
        write(path + '/f', 'same', 0o644, 10**18)
    os.mkdir(far + '/src/.file_replicator.0123456789ab')
    os.utime(far + '/src', ns=(1, os.stat(source).st_mtime_ns))
    once('--no-replicate-on-change', source, far, *fault_other_user(fault_open))


def test_what_a_killed_run_left_on_its_way_does_not_come_behind_the_next_ones_back(tmp_path):
    source, there = option_source(tmp_path)
    for number in range(3000):
        write('%s/d%d/%d' % (source, number // 10, number), os.urandom(2000))
    link = FAULT_SLOW_LINK.replace('delay = queue.Queue(), 0', 'delay = queue.Queue(), 1')
    # as behind docker the far side does not notice that nobody hears it any more
    slow = 'sh', '-c', '"$@" | { cat; cat >/dev/null; }', 'sh', sys.executable, '-c', link
    with Running(tmp_path, source, there.parent, *slow, wait=False) as running:
        until(lambda: option_has(there, 'd110'), 20, running.log)
        os.kill(running.process.pid, signal.SIGKILL)
        for name in os.listdir(str(source)):
            shutil.rmtree(str(source / name))
        write(str(source / 'kept'))
        once('--mirror', '--no-replicate-on-change', source, there.parent, *slow)
        assert option_paths(there) == ['kept']


def test_what_git_leaves_out_over_there_stays_though_a_link_stands_there_here(tmp_path):
    source, there = option_source(tmp_path, 'sub/')
    write(str(source / '.gitignore'), 'node_modules/\n/storage/*\n')
    write(str(source / 'sub' / '.gitignore'), '/cache/*\n')
    git_init(source)
    for name in ('node_modules', 'storage', 'sub/cache', 'other'):
        os.symlink(str(tmp_path), str(source / name))
        write('%s/%s/theirs' % (there, name))
    done = option_once(tmp_path, '--mirror', expect=1)
    assert option_has(there, 'node_modules/theirs', 'storage/theirs', 'sub/cache/theirs')
    assert os.path.islink(str(there / 'other')) and done.stderr.count('not empty') == 3


def test_what_git_ignores_is_left_out_however_deep_it_comes(tmp_path):
    """git (2.39) crashes where it tells from which file a pattern is, above some twenty directories."""
    source, there = option_source(tmp_path, 'd/' * 40)
    write(str(source / '.gitignore'), '*.o\n')
    git_init(source)
    with option_watching(tmp_path) as running:
        for name in ('a.o', 'a.c'):
            write('%s/%s%s' % (source, 'd/' * 40, name))
        until(lambda: option_has(there, 'd/' * 40 + 'a.c'), 10, running.log)
        assert not option_has(there, 'd/' * 40 + 'a.o')


def test_of_endless_words_only_some_are_said(tmp_path):
    source, there = option_source(tmp_path, 'f')
    done = once(source, there.parent, 'sh', '-c', 'seq -s " " 9999 >&2; exit 3', expect=1)
    assert re.search(r'status 3:  ?\d+ \d+ ', done.stderr) and len(done.stderr) < 3000


def test_what_a_killed_session_left_of_its_own_goes_with_no_delete_too(tmp_path):
    source, there = option_source(tmp_path, 'f')
    for name in ('.file_replicator.0123456789ab-new', 'theirs'):
        write(str(there / name))
    option_once(tmp_path, '--no-delete')
    assert sorted(os.listdir(str(there))) == ['f', 'theirs']


def test_a_file_with_two_names_and_an_interval_comes_to_rest(tmp_path):
    source, there = option_source(tmp_path, 'f')
    with option_watching(tmp_path, '--update-interval', '0.5') as running:
        write(str(source / 'f'), 'changed')
        until(lambda: fault_holds(str(there), 'f', b'changed'), 10, running.log)
        os.link(str(source / 'f'), str(source / 'g'))
        until(lambda: option_has(there, 'g'), 10, running.log)
        time.sleep(1.5)                 # what was put off is sent by then
        before = running.out()
        time.sleep(1.5)
        assert running.out() == before
        with open(str(source / 'g'), 'a') as file:
            file.write(' again')
        until(lambda: fault_holds(str(there), 'f', b'changed again') and fault_holds(str(there), 'g', b'changed again'), 10, running.log)


def test_what_was_unpacked_into_a_staging_that_was_taken_away_is_not_said_to_be_sent(tmp_path):
    source, there = option_source(tmp_path, 'f')
    write(str(tmp_path / 'path/tar'), '#!/bin/sh\n%s "$@"; status=$?\ncase $PWD in */.file_replicator.????????????)\n'
          '  [ ! -e %s/armed ] || { rm %s/armed; mv "$PWD" %s/taken; } ;; esac\nexit $status\n'
          % (need('tar'), tmp_path, tmp_path, tmp_path), 0o755)
    _, usual, shell = shell_command(tmp_path, 'bash')
    with Running(tmp_path, source, there.parent, 'env', 'PATH=%s:%s' % (tmp_path / 'path', usual[5:]), shell) as running:
        write(str(tmp_path / 'armed'))
        for number in range(5):
            write(str(tmp_path / 'new' / str(number)))
        os.rename(str(tmp_path / 'new'), str(source / 'new'))
        until(lambda: 'connected again' in running.err() and running.out().count('in step') == 2, 10, running.log)
        assert len(option_lines(running.out(), 'sent')) == 6 and option_has(there, 'new/4')


# ---- renames that take along what they must not, and modes on the way

@contextlib.contextmanager
def at_once(running):
    """What is done within is seen by the program in one look. Waits until that is replicated."""
    running.process.send_signal(signal.SIGSTOP)
    before = running.out().count('in step')
    yield
    running.process.send_signal(signal.SIGCONT)
    running.in_step(before + 1)


@pytest.mark.parametrize('old, new', [(0o555, 0o700), (0o511, 0o710), (0o555, 0o500), (0o755, 0o700)])
@pytest.mark.parametrize('user', ['root', 'another'])
def test_a_directory_that_is_closed_and_opened_at_once_gets_its_mode_though_something_in_it_changed(fault_open, old, new, user):
    source, far = fault_open + '/src', fault_open + '/far'
    write(source + '/d/f', 'old')
    os.chmod(source + '/d', old)
    os.mkdir(far)
    fault_give(far)
    connect = fault_other_user(fault_open) if user == 'another' else ['bash']
    with Running(fault_open, source, far, *connect) as running:
        with at_once(running):
            write(source + '/d/f', 'new')
            os.chmod(source + '/d', new)
        until_equal(source, far + '/src', 5, running=running)
        assert not running.err()


@pytest.mark.parametrize('option', ['--no-delete', '--mirror', ''])
@pytest.mark.parametrize('rule', ['--exclude', '.gitignore', 'git mv'])
@pytest.mark.parametrize('here', ['is here too', 'is only there'])
def test_a_rename_above_what_is_left_out_leaves_that_where_it_is(tmp_path, option, rule, here):
    source, there = option_source(tmp_path, 'app/code', 'other')
    write(str(there / 'app/data/db'), 'precious')
    if here == 'is here too':
        write(str(source / 'app/data/db'), 'of here')
    if rule != '--exclude':
        write(str(source / '.gitignore'), '/app/data\n')
    if rule == 'git mv':
        for words in (['init', '-q'], ['add', '.']):
            subprocess.run([need('git'), '-C', str(source), *words], check=True)
    options = [word for word in (option, *(['--exclude', '/app/data'] if rule == '--exclude' else [])) if word]
    with option_watching(tmp_path, *options) as running:
        with at_once(running):
            if rule == 'git mv':
                subprocess.run([need('git'), '-C', str(source), 'mv', 'app', 'web'], check=True)
            else:
                os.rename(str(source / 'app'), str(source / 'web'))
        until(lambda: option_has(there, 'web/code'), 10, running.log)
    option_once(tmp_path, *options)
    assert fault_holds(str(there), 'app/data/db', b'precious')
    assert not (here == 'is only there' and option_has(there, 'web/data'))


def test_a_rename_above_a_mount_leaves_that_where_it_is(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    write(source + '/app/code')
    with fault_tmpfs(far + '/src/app/data', 'size=1m'):
        write(far + '/src/app/data/db', 'precious')
        with Running(fault_open, source, far, 'bash') as running:
            os.rename(source + '/app', source + '/web')
            until(lambda: os.path.exists(far + '/src/web/code'), 10, running.log)
            assert os.path.ismount(far + '/src/app/data') and os.listdir(far + '/src/app/data') == ['db']


def test_a_rename_into_another_file_system_over_there_shows_no_part_of_a_file(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    write(source + '/vol/file', b'old')
    write(source + '/new', b'x' * (60 << 20))
    with fault_tmpfs(far + '/src/vol', 'size=200m'), Running(fault_open, source, far, 'bash') as running:
        os.rename(source + '/new', source + '/vol/file')
        sizes = set()

        def size():
            with contextlib.suppress(FileNotFoundError):
                sizes.add(os.stat(far + '/src/vol/file').st_size)
            return 60 << 20 in sizes

        end = time.monotonic() + 20
        while not size() and time.monotonic() < end:
            pass                        # as often as can be
        until_equal(source, far + '/src', running=running)
        assert sizes == {3, 60 << 20}


def test_a_directory_that_may_not_be_written_is_moved_at_once_by_somebody_who_is_not_root(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    for name in ('live', 'staging'):
        write('%s/%s/of %s/f' % (source, name, name), name)
        os.chmod('%s/%s/of %s' % (source, name, name), 0o555)
    os.mkdir(far)
    fault_give(far)
    with Running(fault_open, source, far, *fault_other_user(fault_open)) as running:
        sent = running.out().count('sent ')
        with at_once(running):
            shutil.rmtree(source + '/live')
            os.rename(source + '/staging', source + '/live')
        until_equal(source, far + '/src', 5, running=running)
        assert running.out().count('sent ') == sent and not running.err()


def test_an_unreadable_directory_that_was_renamed_goes_when_it_goes_here(tmp_path, fault_not_root):
    source, there = option_source(tmp_path, 'a/b/f')
    with option_watching(tmp_path) as running:
        os.chmod(str(source / 'a/b'), 0o300)
        running.says('cannot be listed')
        os.rename(str(source / 'a'), str(source / 'z'))
        running.says('renamed a -> z')
        os.rename(str(source / 'z'), str(tmp_path / 'elsewhere'))
        until(lambda: option_paths(there) == [], 10, running.log)
        os.chmod(str(tmp_path / 'elsewhere/b'), 0o700)


def test_an_edit_that_keeps_size_and_time_follows_each_of_several_renames(tmp_path):
    source, there = option_source(tmp_path, 'e/b/x/c', 'g/old')
    ctypes = pytest.importorskip('ctypes')
    with option_watching(tmp_path) as running:
        with at_once(running):
            assert not ctypes.CDLL(None).renameat2(-100, bytes(source / 'e/b'), -100, bytes(source / 'g'), 2)       # they change places
            os.rename(str(source / 'e'), str(source / 'e2'))
            before = os.stat(str(source / 'g/x/c'))
            write(str(source / 'g/x/c'), 'E/B/X/C', mtime_ns=before.st_mtime_ns)
        until_equal(str(source), str(there), 5, running=running)


def test_thousands_of_patterns_are_no_argument_too_long(tmp_path):
    source, there = option_source(tmp_path, 'f', 'left/out', 'last')
    patterns = itertools.chain.from_iterable(['--exclude', 'pattern%d' % number] for number in range(4000))
    option_once(tmp_path, *patterns, '--exclude', 'out', '--exclude', 'last')
    assert option_paths(there) == ['f', 'left']


def test_where_nothing_says_when_a_file_was_made_one_that_takes_the_number_of_another_is_sent(fault_open, monkeypatch, tmp_path):
    """musl before 1.2.5 has no statx; ext4 gives the number of what is gone to what is made next."""
    fault_root()
    source, far = fault_open + '/here/src', fault_open + '/far'
    fault_other_number(monkeypatch, tmp_path, "here, no_follow, made = -100", "return 0\n        here, no_follow, made = -100")
    with open(fault_open + '/image', 'wb') as image:
        image.truncate(16 << 20)
    subprocess.run([need('mkfs.ext4'), '-q', '-F', fault_open + '/image'], stderr=subprocess.DEVNULL, check=True)
    os.makedirs(fault_open + '/here')
    os.mkdir(far)
    subprocess.run(['mount', '-o', 'loop', fault_open + '/image', fault_open + '/here'], check=True)
    names = ['f%d' % number for number in range(8)]
    for name in names:
        write(source + '/' + name, 'old ' + name, mtime_ns=10**18)
    with Running(fault_open, '--no-gitignore', source, far, 'bash') as running:
        for number in range(3):
            with at_once(running):
                for name in names:
                    os.unlink(source + '/' + name)
                    write(source + '/new', '%3d %s' % (number, name), mtime_ns=10**18)
                    os.rename(source + '/new', source + '/' + name)
            until_equal(source, far + '/src', 5, running=running)


def test_removing_a_deep_tree_does_not_take_the_square_of_its_depth_for_each_of_its_directories(tmp_path):
    source, there = option_source(tmp_path, 'd/' * 600 + 'f')
    with option_watching(tmp_path) as running:
        start = time.monotonic()
        subprocess.run(['rm', '-r', str(source / 'd')], check=True)
        until(lambda: option_paths(there) == [], 20, running.log)
        assert time.monotonic() - start < 6


# ---- far sides with odd tools

def test_fractions_of_times_arrive_though_the_tar_over_there_does_not_know_them(tmp_path):
    source, there = option_source(tmp_path)
    connect = shell_command(tmp_path, 'dash')
    fault_command(tmp_path / 'shims-dash', 'tar', '#!/bin/sh\nexec %s tar "$@"\n' % need('busybox'))
    for number in range(5):
        write('%s/%d' % (source, number), mtime_ns=10**18 + 123456789)
    once('--no-replicate-on-change', source, there.parent, *connect)
    assert not difference(str(source), str(there))


@pytest.mark.parametrize('name', ['cd', 'mv', 'rm', 'touch', '[', 'read', 'find'])
def test_a_function_that_bash_took_from_its_environment_is_no_tool(tmp_path, name):
    source, there = option_source(tmp_path, 'a', 'b', 'c', 'd/e')
    option_age(source)
    once('--no-replicate-on-change', source, there.parent, *shell_command(tmp_path, 'bash'), env={'BASH_FUNC_%s%%%%' % name: '() { :; }'})
    assert not difference(str(source), str(there))


@pytest.mark.parametrize('option', ['--mirror', '--clean-out-first', '--quiet'])
def test_a_far_side_that_cannot_list_what_stands_there_is_not_taken_for_an_empty_one(tmp_path, option):
    source, there = option_source(tmp_path, 'f')
    write(str(there / 'theirs'))
    connect = shell_command(tmp_path, 'dash')
    for name, word in (('find', '-printf'), ('stat', '-c')):
        fault_command(tmp_path / 'shims-dash', name, '#!/bin/sh\ncase " $* " in *" %s "*) echo "%s: illegal option" >&2; exit 1; esac\n'
                      'exec %s "$@"\n' % (word, name, need(name)))
    done = once(option, source, there.parent, *connect, expect=1)
    assert 'cannot be listed' in done.stderr and option_paths(there) == ['theirs']


@pytest.mark.parametrize('tool, words', [('mv', 'f: mv: not found'), ('dd', 'dd: not found'), ('rm', 'rm: not found'),
                                         ('find', 'status 127')])
def test_a_tool_that_is_missing_is_named(tmp_path, tool, words):
    source, there = option_source(tmp_path, 'f')
    root = dash_root(str(tmp_path / 'root'))
    os.unlink('%s/bin/%s' % (root, tool))
    done = once('--no-replicate-on-change', source, '/srv', need('chroot'), root, '/bin/sh', expect=1)
    assert words in done.stderr and not re.search('[0-9a-f]{12}', done.stderr)


def test_a_large_file_may_take_its_time_to_another_file_system_over_there(fault_open, monkeypatch, tmp_path):
    source, far = fault_open + '/src', fault_open + '/far'
    fault_other_number(monkeypatch, tmp_path, 'SILENT_SECONDS = 12, 25 ', 'SILENT_SECONDS = 12, 2 ')
    connect = shell_command(tmp_path, 'dash')
    fault_command(tmp_path / 'shims-dash', 'mv', '#!/bin/sh\ncase $* in *part*) sleep 4; esac\nexec %s "$@"\n' % need('mv'))
    write(source + '/vol/large', FAULT_BIG)
    with fault_tmpfs(far + '/src/vol', 'size=20m'):
        done = once('--no-replicate-on-change', source, far, *connect)
        assert not done.stderr and not difference(source, far + '/src')


@pytest.mark.parametrize('above', [False, True], ids=['the source', 'what it is in'])
def test_a_source_that_is_elsewhere_for_a_moment_while_it_is_looked_at_has_lost_nothing(tmp_path, above):
    top = str(tmp_path / 'above/src')
    for name in 'abc':
        write(os.path.join(top, name))
    source = looked_at(top)
    moved, see = os.path.dirname(top) if above else top, source.see

    def see_once_while_it_is_away(*words, **more):
        source.see = see
        os.rename(moved, moved + '.away')
        try:
            return see(*words, **more)
        finally:
            os.rename(moved + '.away', moved)
    source.see = see_once_while_it_is_away
    for name in 'abc':
        source.hint(name, fr.LOOK)
    source.look()
    assert set(source.tree.below('')) == {'a', 'b', 'c'} and not source.gone
    source.watch.give_up('the end')


def test_what_git_ignores_stays_out_though_git_looked_while_the_source_was_elsewhere(tmp_path):
    top = str(tmp_path / 'src')
    write(top + '/.gitignore', 'secret')
    write(top + '/secret')
    since = time.time()
    source, seen = git_looked_at(top)
    until(lambda: time.time() > since + 0.2, 5)         # else it would be asked about by itself, as new
    refresh = source.left_out.refresh

    def refresh_once_while_it_is_away():
        source.left_out.refresh = refresh
        os.rename(top, top + '.away')
        try:
            return refresh()
        finally:
            os.rename(top + '.away', top)
    source.left_out.refresh = refresh_once_while_it_is_away
    source.rules_changed = True
    assert git_seen(source) == seen == {'.gitignore'}
    git_close(source)


def git_that_moves(directory, source):
    """PATH with a git that once, if there is a file called `trigger`, moves the source away first."""
    fault_command(directory / 'git-shim', 'git', """#!/bin/sh
! rm {0}/trigger 2>/dev/null || mv {1} {1}.away
exec {2} "$@"
""".format(directory, source, need('git')))
    return dict(os.environ, PATH='%s/git-shim:%s' % (directory, os.environ['PATH']))


def test_what_waits_for_its_turn_when_the_source_goes_is_not_removed(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    names = ['%04d' % number for number in range(3000)]
    for name in names:
        write(source + '/' + name, 'a' * 3000)
    write(source + '/.gitignore', 'none')
    os.mkdir(far)
    once('--no-replicate-on-change', source, far, 'bash')
    connect, _ = fault_relay(tmp_path, 'bash', slow=0.02)
    with Running(tmp_path, source, far, *connect, env=git_that_moves(tmp_path, source)) as running:
        for name in names:
            write(source + '/' + name, 'b' * 3000)
        until(lambda: running.out().count('sent 0') > 200, 20, running.log)
        running.process.send_signal(signal.SIGSTOP)
        for name in names:
            write(source + '/' + name, 'c' * 3000)
        write(str(tmp_path / 'trigger'))
        write(source + '/.gitignore', 'nothing')
        running.process.send_signal(signal.SIGCONT)
        running.says('is gone')
        before = running.connections()
        until(lambda: 'not in step' in running.err(), 60, running.log)
        assert set(names) <= set(os.listdir(far + '/src')) and 'removed' not in running.out()
        os.rename(source + '.away', source)
        until_equal(source, far + '/src', 60, running=running)
        assert before == running.connections()


def records_of(running, change):
    """The records that a change has sent, as --debugging shows them."""
    before = len(running.err())
    with at_once(running):
        change()
    return re.findall(r' record (?:bulk|dir|file|meta|move|remove) \d+ \d+ (.*)', running.err()[before:])


def test_a_new_file_does_not_wait_for_the_time_of_its_directory(tmp_path, monkeypatch):
    fault_other_number(monkeypatch, tmp_path, 'QUIET_SECONDS = 0.2', 'QUIET_SECONDS = 9')
    source, there = option_source(tmp_path, 'D/f')
    with option_watching(tmp_path, '--debugging') as running:
        before = len(running.err())
        with open(str(source / 'D/new'), 'w') as file:
            until(lambda: re.search('event D/new .*CREATE', running.err()), 10, running.log)
            file.write('new')
        until_equal(str(source), str(there), 5, running=running)
        sent = re.findall(r' record (file|meta) .*', running.err()[before:])
        assert sent == ['file', 'meta'], running.err()[before:]


def test_a_signal_while_it_clears_up_at_its_end_changes_nothing(tmp_path):
    source, there = option_source(tmp_path, 'a', '.gitignore')
    (tmp_path / 'tmp').mkdir()
    for _ in range(5):
        process = subprocess.Popen(command('--no-replicate-on-change', source, there.parent, 'bash'), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, env=dict(os.environ, TMPDIR=str(tmp_path / 'tmp')))
        stood = False
        while process.poll() is None:
            stands = any((tmp_path / 'tmp').glob('*/HEAD'))
            if stood and not stands:
                process.send_signal(signal.SIGTERM)
                break
            stood = stands
        assert process.communicate()[1] == b'' and process.returncode == 0
        assert stood and not os.listdir(str(tmp_path / 'tmp'))


def test_a_left_out_file_that_is_never_replicated_keeps_nothing_waiting(tmp_path, monkeypatch):
    fault_other_number(monkeypatch, tmp_path, 'QUIET_SECONDS = 0.2', 'QUIET_SECONDS = 9')
    source, there = option_source(tmp_path, 'D/f')
    with option_watching(tmp_path, '--exclude', '*.o') as running:
        with open(str(source / 'D/new.o'), 'w'):
            until(lambda: os.stat(str(there / 'D')).st_mtime_ns == os.stat(str(source / 'D')).st_mtime_ns, 4, running.log)
            running.in_step(2)


def test_a_directory_is_opened_behind_what_is_closed_in_it(tmp_path):
    source, there = option_source(tmp_path, 'D/f')
    os.chmod(str(source / 'D'), 0o700)
    with option_watching(tmp_path, '--debugging') as running:
        sent = records_of(running, lambda: (os.chmod(str(source / 'D/f'), 0o600), os.chmod(str(source / 'D'), 0o755)))
        assert [line.split()[0] for line in sent] == ['00600', '00755'], sent


def test_a_directory_is_opened_behind_all_that_is_closed_in_it_though_that_takes_several_turns(tmp_path):
    names = ['D/%04d' % number for number in range(2500)]
    source, there = option_source(tmp_path, *names)
    os.chmod(str(source / 'D'), 0o700)
    with option_watching(tmp_path, '--debugging') as running:
        def change():
            for name in names:
                os.chmod(str(source / name), 0o600)
            os.chmod(str(source / 'D'), 0o755)
        sent = [line.split()[0] for line in records_of(running, change)]
        assert sent.count('00755') == 1 and sent.index('00755') > max(i for i, mode in enumerate(sent) if mode == '00600')
        until_equal(str(source), str(there), 10, running=running)


@pytest.mark.parametrize('what, modes', [('D/f', {'D/f': 0o600}), ('D/s', {'D/s/f': 0o600, 'D/s': 0o700})])
def test_what_is_closed_and_renamed_to_an_open_place_is_closed_before(tmp_path, what, modes):
    source, there = option_source(tmp_path, 'D/f', 'D/s/f', 'pub/p')
    os.chmod(str(source / 'D'), 0o700)
    with option_watching(tmp_path, '--debugging') as running:
        def change():
            for path, mode in modes.items():
                os.chmod(str(source / path), mode)
            os.rename(str(source / what), str(source / 'pub/new'))
        sent = records_of(running, change)
        move = next(at for at, line in enumerate(sent) if 'pub/new' in line and './D/' in line)
        for path, mode in modes.items():
            assert any(line.startswith('%05o -\\n./%s\\n' % (mode, path)) for line in sent[:move]), sent
        until_equal(str(source), str(there), 10, running=running)


def test_a_large_file_that_is_closed_while_it_is_on_its_way_is_closed_when_it_appears(tmp_path):
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(source)
    os.mkdir(far)
    connect, _ = fault_relay(tmp_path, 'bash', slow=0.005)
    with Running(tmp_path, source, far, *connect) as running:
        write(source + '/new', FAULT_BIG)
        until(lambda: fault_staging(far + '/src'), 20, running.log)
        os.chmod(source + '/new', 0o600)
        mode = until(lambda: os.path.exists(far + '/src/new') and os.stat(far + '/src/new').st_mode, 30, running.log)
        assert stat.S_IMODE(mode) == 0o600
        until_equal(source, far + '/src', running=running)


def test_what_git_left_out_comes_when_another_kind_of_thing_stands_there(tmp_path):
    source, there = option_source(tmp_path, 'd/build/x', 'd/keep', 'kept')
    git_init(str(source))
    write(str(source / '.gitignore'), 'build/\nkept/\n')
    write(str(tmp_path / 'prepared/build'), 'a file')
    with option_watching(tmp_path) as running:
        os.rename(str(source / 'd'), str(tmp_path / 'gone'))
        until(lambda: not os.path.exists(str(there / 'd')), 10, running.log)
        os.rename(str(tmp_path / 'prepared'), str(source / 'd'))
        until(lambda: fault_holds(str(there), 'd/build', b'a file'), 10, running.log)
        with at_once(running):
            os.unlink(str(source / 'kept'))
            write(str(source / 'kept/in'))
            write(str(source / 'last'))
        assert os.path.exists(str(there / 'last')) and not os.path.isdir(str(there / 'kept'))


@pytest.mark.parametrize('names, change', [
    ('b', ['b t', 'edit t', 't a']), ('b', ['b t', 'edit t', 't b']), ('b c', ['b t', 'edit t', 'c b', 't c']),
    ('b', ['b ../out', 'edit ../out', '../out b']), ('b', ['b ../out', 'edit ../out', '../out a']),
], ids=['elsewhere', 'and back', 'two change places', 'outside and back', 'outside and elsewhere'])
def test_an_edit_between_renames_that_keeps_size_and_time_is_sent(tmp_path, names, change):
    source, there = option_source(tmp_path)
    for name in names.split():
        write(str(source / name), 'AAAA', mtime_ns=10**18)
    with option_watching(tmp_path) as running:
        with at_once(running):
            for step in change:
                old, new = (str(source / name) for name in step.split())
                if step.startswith('edit'):
                    with open(new, 'r+b') as file:
                        file.write(b'BBBB')
                    os.utime(new, ns=(10**18, 10**18))
                else:
                    os.rename(old, new)
        until_equal(str(source), str(there), 5, running=running)


@pytest.mark.parametrize('far', OPTION_FARS)
def test_a_rename_to_what_is_another_name_of_the_same_file_over_there_leaves_no_other(tmp_path, far):
    source, _ = option_source(tmp_path, 'a', 'b')
    there = option_replica(tmp_path, far)
    for name in 'ab':
        os.utime(str(source / name), (1, 1))
    option_once(tmp_path, far=far)
    os.unlink(there + '/b')
    os.link(there + '/a', there + '/b')
    with option_watching(tmp_path, far=far) as running:
        os.rename(str(source / 'a'), str(source / 'b'))
        running.says('renamed a -> b')
        until_equal(str(source), there, 10, whole_seconds=True, running=running)


@pytest.mark.parametrize('what', ['bulk', 'part'])
def test_what_the_far_sides_dd_was_killed_in_the_midst_of_is_not_taken_for_whole(tmp_path, what):
    """It had read all of it, and what it gave to a tar or another dd looks as if it were all there was."""
    source, far = str(tmp_path / 'src'), str(tmp_path / 'far')
    os.mkdir(far)
    if what == 'bulk':
        os.mkdir(source)
    else:
        write(source + '/big', FAULT_BIG)
    connect = shell_command(tmp_path, 'dash')
    fault_command(tmp_path / 'shims-dash', 'dd', """#!/bin/sh
case $*/$FILE_REPLICATOR in
  *count=*/?*)
    if [ -p /dev/stdin ] && [ -e {0}/kill ] && {1} "$@" >{0}/all && [ "$(wc -c <{0}/all)" -gt 1024 ]; then
      rm {0}/kill
      head -c 1024 {0}/all
      kill -9 $$
    fi
    [ ! -e {0}/all ] || {{ cat {0}/all; rm {0}/all; exit; }} ;;
esac
exec {1} "$@"
""".format(tmp_path, need('dd')))
    with Running(tmp_path, source, far, *connect) as running:
        write(str(tmp_path / 'kill'))
        if what == 'bulk':
            os.rename(str(fault_few_files(tmp_path / 'made')), source + '/d')
        else:
            with open(source + '/big', 'r+b') as file:
                file.seek((3 << 20) + 5000)
                file.write(b'other')
        until(lambda: not os.path.exists(str(tmp_path / 'kill')), 10, running.log)
        until_equal(source, far + '/src', 20, running=running)


def fault_few_files(directory):
    for number in range(9):
        write(str(directory / str(number)), 'data')
    return directory


@pytest.mark.parametrize('delay', [1.1, 1.3, 1.5])
def test_a_signal_while_a_lost_connection_is_ended_leaves_nothing(tmp_path, delay):
    source, there = option_source(tmp_path, 'a')
    far = fault_command(tmp_path, 'connect', '#!%s\ntrap "" TERM HUP\necho $$ >%s/pid\n(bash)\nexec >&- 2>&-\nexec sleep 77\n'
                        % (need('bash'), tmp_path))
    with Running(tmp_path, source, there.parent, far) as running:
        pid = int((tmp_path / 'pid').read_text())
        inner = [int(line) for line in subprocess.run(['ps', '-o', 'pid=', '-s', str(pid)], stdout=subprocess.PIPE,
                                                      check=True).stdout.split() if int(line) != pid]
        for each in inner:
            with contextlib.suppress(OSError):
                os.kill(each, signal.SIGKILL)
        until(lambda: os.readlink('/proc/%d/exe' % pid) != os.path.realpath(need('bash')), 5)
        time.sleep(delay)               # not to wait for anything: this is when the signal comes
        running.stop()
        until(lambda: not os.path.exists('/proc/%d/exe' % pid), 5, running.log)


@pytest.mark.parametrize('edit, status', [(r's/^\([0-9a-f]* + .*\)/\1\ntick/', 0), (r's/^\([0-9a-f]* at .*\)/\1\ntick/', 0),
                                          (r's/^\([0-9a-f]* sums .*\)/\1\ntick/', 0), (r'/^[0-9a-f]* + /d', 1),
                                          (r's/^\([0-9a-f]* + .*\) .*/\1/', 1)])
@pytest.mark.parametrize('full', [False, True])
def test_a_line_that_comes_between_or_is_lost_is_no_reason_for_a_traceback(tmp_path, monkeypatch, capfd, edit, status, full):
    source, there = option_source(tmp_path, 'a', 'b', 'd/c')
    if full:
        option_once(tmp_path)
        write(str(source / 'b'), 'other')
    monkeypatch.setattr(fr, 'GIVE_UP_SECONDS', 1)
    words = ['--checksum', '--no-replicate-on-change', str(source), str(there.parent), 'sh', '-c', 'bash | sed -u %s' % shlex.quote(edit)]
    assert fr.main(words) == status
    assert ('changes what the far side says' in capfd.readouterr().err) == bool(status)
    assert status or not difference(str(source), str(there))


def test_what_is_mounted_in_the_replica_stays_though_a_line_comes_between(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    write(source + '/m/in')
    write(fault_open + '/theirs/data')
    os.makedirs(far + '/src/m')
    with fault_mount(far + '/src/m', '--bind', fault_open + '/theirs'):
        once('--mirror', '--no-replicate-on-change', source, far, 'sh', '-c', 'bash | sed -u "/ at /a noise"')
        assert sorted(os.listdir(fault_open + '/theirs')) == ['data', 'in']


def test_what_is_removed_here_makes_room_where_nothing_can_be_made(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    os.mkdir(source)
    with fault_tmpfs(far, 'size=4m,nr_inodes=24'):
        with Running(fault_open, source, far, 'bash') as running:
            for number in range(40):
                write('%s/%02d' % (source, number))
            running.says('No space left')
            until(lambda: os.statvfs(far).f_ffree == 0 and not fault_staging(far + '/src'), 20, running.log)
            running.cut()
            until(lambda: running.err().count('No space left') > 1, 20, running.log)
            for name in sorted(os.listdir(far + '/src'))[:15] + ['%02d' % number for number in range(25, 40)]:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(source + '/' + name)
            until_equal(source, far + '/src', 60, running=running)


def test_a_file_whose_name_changes_its_case_goes_and_comes_since_both_may_be_one_name_over_there(tmp_path):
    source, there = option_source(tmp_path, 'Readme', 'Dir/f')
    with option_watching(tmp_path) as running:
        os.rename(str(source / 'Readme'), str(source / 'README'))
        os.rename(str(source / 'Dir'), str(source / 'dir'))
        until_equal(str(source), str(there), running=running)
        running.in_step(2)
        assert running.out().index('removed Readme') < running.out().index('sent README') and 'renamed Dir -> dir' in running.out()


def test_while_nothing_at_all_can_be_made_over_there_one_connection_is_lost_and_the_reason_said_once(fault_open):
    source, far = fault_open + '/src', fault_open + '/far'
    write(source + '/f')
    with fault_tmpfs(far, 'size=1m,nr_inodes=8'):
        with Running(fault_open, source, far, 'bash') as running:
            filling = []
            with contextlib.suppress(OSError):
                while True:
                    filling.append('%s/filling%d' % (far, len(filling)))
                    write(filling[-1])
            running.cut()
            write(source + '/more')
            running.says('still no connection: cannot write to %s/src over there' % far)
            assert running.err().count('connection lost') == 1 and 'connected again' not in running.err(), running.log()
            for path in filling[:-1]:
                os.unlink(path)
            until_equal(source, far + '/src', running=running)
            running.says('connected again')


def test_a_remote_hook_that_removes_what_is_not_tracked_is_no_other_program(tmp_path):
    source, there = option_source(tmp_path, 'f')
    with option_watching(tmp_path, '--remote-hook', 'ls -A >%s/seen; rm -rf ./.[!.]*; cat >>%s/read' % (tmp_path, tmp_path)) as running:
        for number in range(5):
            write(str(source / 'f'), str(number))
            until(lambda: (tmp_path / 'read').exists() and (tmp_path / 'read').read_bytes() == b'f\0' * (number + 2), 10, running.log)
        until_equal(str(source), str(there), running=running)
        assert (tmp_path / 'seen').read_text() == 'f\n' and running.err() == ''


def test_in_a_submodule_that_was_put_aside_git_is_asked_about_what_stands_there(tmp_path):
    library, source = tmp_path / 'library', tmp_path / 'src'
    git_init(library)
    write(str(library / '.gitignore'), '*.l\n')
    git(library, 'add', '-A')
    git(library, 'commit', '-qm', '1')
    git_init(source)
    git(source, 'submodule', '--quiet', 'add', str(library), 'lib')
    write(str(source / 'lib/old.l'))
    os.mkdir(str(tmp_path / 'there'))
    with option_watching(tmp_path) as running:
        os.rename(str(source / 'lib'), str(source / 'lib2'))
        until(lambda: fault_holds(str(tmp_path / 'there/src'), 'lib2/.gitignore', b'*.l\n'), 10, running.log)
    git(source, 'submodule', '--quiet', 'update')
    option_once(tmp_path)
    assert not os.path.exists(str(tmp_path / 'there/src/lib2/old.l'))
    assert os.path.exists(str(tmp_path / 'there/src/lib/.gitignore'))


def test_changed_rules_are_taken_up_where_git_s_own_directory_is_behind_a_link(tmp_path):
    source, there = option_source(tmp_path, 'x.o', 'n1')
    git_init(source)
    write(str(source / '.gitignore'), '*.o\n')
    os.rename(str(source / '.git/info'), str(tmp_path / 'info'))
    os.symlink(str(tmp_path / 'info'), str(source / '.git/info'))
    os.rename(str(source / '.git'), str(tmp_path / 'real.git'))
    os.symlink(str(tmp_path / 'real.git'), str(source / '.git'))
    write(str(tmp_path / 'info/exclude'), 'n*\n')
    before = time.time()
    with option_watching(tmp_path) as running:
        until(lambda: time.time() > before + 1, 5)      # else git's own time tells
        git(source, 'add', '-f', 'x.o')
        until(lambda: os.path.exists(str(there / 'x.o')), 10, running.log)
        before = time.time()
        until(lambda: time.time() > before + 1, 5)
        write(str(tmp_path / 'info/exclude'), '')
        until(lambda: os.path.exists(str(there / 'n1')), 10, running.log)


@pytest.mark.parametrize('option', ['--clean-out-first', '--mirror'])
def test_a_source_that_is_its_own_replica_by_another_way_is_not_emptied(fault_open, option):
    source, far = fault_open + '/src', fault_open + '/far'
    write(source + '/file')
    write(source + '/left.out')
    os.makedirs(far + '/src')
    with fault_mount(far + '/src', '--bind', source):
        done = once(option, '--exclude', 'none', source, far, 'bash', expect=1)
        assert 'are the same or one is inside the other' in done.stderr
        assert sorted(os.listdir(source)) == ['file', 'left.out']


def test_what_was_written_through_a_name_elsewhere_is_sent_though_only_the_mode_had_an_event(tmp_path):
    source, there = option_source(tmp_path)
    write(str(source / 'f'), '000001', mtime_ns=10**18)
    os.link(str(source / 'f'), str(tmp_path / 'elsewhere'))
    with option_watching(tmp_path) as running:
        with open(str(tmp_path / 'elsewhere'), 'r+') as file:
            file.write('000002')
        os.chmod(str(source / 'f'), 0o600)
        until_equal(str(source), str(there), 5, running=running)


def test_a_git_directory_that_is_no_repository_leaves_the_rules_from_above_in_force(tmp_path):
    git_init(tmp_path)
    write(str(tmp_path / '.gitignore'), '/src/log/\n*.o\n')
    source, there = option_source(tmp_path, 'a.o', 'kept', 'log/private')
    os.mkdir(str(source / '.git'))
    option_once(tmp_path)
    assert option_paths(there) == ['kept']


def test_a_remote_hook_sees_the_time_of_the_replica_itself(tmp_path):
    source, there = option_source(tmp_path, 'f')
    with option_watching(tmp_path, '--remote-hook', 'stat -c %%Y . >%s/seen' % tmp_path) as running:
        write(str(source / 'f'), 'more')
        os.utime(str(source), (10**9, 10**9))
        until_equal(str(source), str(there), 10, running=running)
        write(str(source / 'f'), 'and more')
        until(lambda: (tmp_path / 'seen').exists() and (tmp_path / 'seen').read_text() == '1000000000\n', 10, running.log)


@pytest.mark.parametrize('target', ['conf.new', 'conf'])
def test_a_link_takes_the_place_of_the_very_file_it_leads_to(tmp_path, target):
    source, there = option_source(tmp_path, 'conf')
    option_once(tmp_path, far='dash')
    os.rename(str(source / 'conf'), str(source / 'conf.new'))
    os.symlink(target, str(source / 'conf'))
    done = option_once(tmp_path, far='dash')
    assert not done.stderr and os.readlink(str(there / 'conf')) == target


def test_the_old_version_of_a_large_file_is_closed_before_its_directory_is_opened(tmp_path):
    source, there = option_source(tmp_path)
    write(str(source / 'd/large'), FAULT_BIG)
    os.chmod(str(source / 'd'), 0o700)
    with option_watching(tmp_path, '--debugging') as running:
        def change():
            write(str(source / 'd/large'), FAULT_BIG[::-1])
            os.chmod(str(source / 'd/large'), 0o600)
            os.chmod(str(source / 'd'), 0o755)
        sent = records_of(running, change)
        assert [line.split()[0] for line in sent if line.startswith('00')][:2] == ['00600', '00755'], sent
        until_equal(str(source), str(there), 10, running=running)
