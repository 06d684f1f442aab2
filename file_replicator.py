#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# file_replicator: one file that keeps a directory on another computer the same as one here.
# It travels alone: copy it anywhere, read it, run it. The README and the tests are where you had it from.
#
# /// script
# requires-python = ">=3.8"
# dependencies = ["inotify_simple"]
# ///
"""Keeps a directory on another computer the same as one here, over any command that reaches a shell there.

    SRC_DIR ── look ──> local: Tree ─┐
                  ▲                  ├── plan ──> [Step] ── records ══ connection ══> receiver ──> replica
    inotify ── hints                 │                                    ║
                        remote: Tree ┘ <───────────── answers ════════════╝

`local` is what stands here, as it was last looked at. `remote` is what stands over there. Everything this
program does is to make the second equal to the first. An event only says where to look again; what is sent
follows from comparing the two trees. So new directories, renames, lost events, a connection that broke and a
container that was made anew are one and the same case, with more or fewer paths to look at.

Read from the top: the receiver is all that runs over there. The program itself is `replicate`, in section 10;
sections 2, 5 and 6 touch nothing, no clock, no disk and no process.
"""

from __future__ import annotations      # so that none of them costs time at the start

import signal

if __name__ == '__main__':              # until main does better: Ctrl-C during what follows is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import collections
import contextlib
import errno
import fcntl
import functools
import gc
import heapq
import itertools
import os
import re
import select
import shlex
import stat
import struct
import subprocess
import sys
import time
from typing import (Any, Callable, Collection, Deque, Dict, Iterable, Iterator, List, NamedTuple, Optional,
                    Pattern, Sequence, Set, TextIO, Tuple)

__version__ = '1.0'

# ==== 1. The receiver: what runs on the other computer ======================================================
#
# A record is a header line, path lines, a line with a length, that many bytes, and if there are any, a marker
# line:
#
#     VERB NUMBER COUNT WORDS...     COUNT paths follow, each a line (see get for a name that holds a newline)
#     ./path
#     LENGTH MARKER
#     bytes, then MARKER and a newline
#
# What each verb does, and with which words, stands above its function, do_VERB. The answer is a line
# `NONCE NUMBER CODE`: 0 done, 1 failed, 2 not as it was listed, 3 done but for mode or time. Lines before it
# that do not begin with the nonce say why; `NONCE + ...` are values. The nonce is new with each session, so
# no name and no file's bytes can be taken for an answer; the marker with each record, since by then others
# over there may have read the nonce. First come `NONCE ready`, a listing (see list), and `NONCE listed`.

RECEIVER = r'''# What file_replicator.py runs on the far side: functions only; one call of main is appended.
# The rules it keeps: no byte of the stream is left over or taken too much, whatever fails; nothing outside
# the replica is written; nothing is put in place before its last byte is here. A process costs half a
# millisecond, a builtin a hundredth of that, so the common paths are mostly builtins.

# Says why this session cannot go on, and ends it.
give_up() { echo "$nonce stop $1"; exit 1; }

# Ends the session. The staging goes, and with it whatever was half-way.
leave() {
  trap - 0 HUP INT TERM PIPE
  [ -z "$temp" ] || rm -f "$temp"
  [ -z "$staged" ] || [ ! -d "$stage" ] || unstage
  exit 0
}

# Removes the staging; the root gets its time back.
unstage() {
  rm -rf "$stage" && staged=''
  [ -z "$root_time" ] || "$touch" -d "@$root_time" .
}

# Removes what this session made on the way. What stayed would come among what is made next. rm also fails in
# a directory that we may not search, where we made nothing.
scrap() {
  rm -rf "$@" 2>/dev/null && return
  for left; do ! stands "$left" || give_up "cannot remove its own files"; done
}

# True if the replica is where it was; where -ef is not known, if there is any of that name.
# shellcheck disable=SC3013
at_home() { [ -d "$root" ] && { ! [ . -ef . ] || [ . -ef "$root" ]; }; } 2>/dev/null

# Sets p to the path that comes next. A line that ends in / goes on in the next one: that is how a name holds
# a newline, since no path we are sent ends in /.
get() {
  p=
  while IFS= read -r line; do
    case $line in
      */) p=$p${line%/}$newline ;;
      *) p=$p$line; return ;;
    esac
  done
  give_up "this shell cannot read a name that is no text of its locale; run another there"        # as yash
}

# Prints exactly $1 bytes of the stream. busybox's and toybox's head read too much, dd without fullblock stops
# at a short read, and short reads are the normal case behind ssh and docker; so probe picks one that is exact
# here.
take() {
  [ "$1" != 0 ] || return 0
  case $taker in
    1) dd ibs=262144 obs=262144 count="$1" iflag=count_bytes,fullblock status=none ;;
    2) head -c "$1" | cat ;;            # uutils' reads too much if its output is a file
    3) dd ibs=65536 obs=65536 count=$(($1 / 65536)) iflag=fullblock 2>/dev/null && {
         [ $(($1 % 65536)) = 0 ] || dd ibs=$(($1 % 65536)) obs=65536 count=1 iflag=fullblock 2>/dev/null; } ;;
    4) dd ibs=65536 obs=65536 count="$1" iflag=count_bytes 2>/dev/null ;;
    *) dd ibs=1 obs=65536 count="$1" 2>/dev/null ;;
  esac
}

# True if the bytes of this record ended where they should. Where something stopped reading them early (a full
# disk, a tar that gave up), the rest is passed over up to the marker: a file's bytes must never be taken for
# records. A connection that ends here ends the session, so half a record is never acted on.
settle() {
  [ "$length" != 0 ] || return 0
  passed=0
  while IFS= read -r line || leave; do
    case $line in "$marker") return $passed ;; *"$marker") return 1 ;; esac
    passed=1
  done
}

# Passes over the bytes of a record that cannot be used.
skip() { take "$length" >/dev/null; settle; }

# Gives the bytes of this record to a command. True if all of them got there, and it did all it should: if
# take is killed, the command takes what it got for all. What it does not take goes nowhere.
give() {
  took=$({
    { take "$length"; echo $? >&3; } | if "$@" >&2; then echo 0 >&3; else cat >/dev/null; fi
  } 3>&1)
  settle && [ "$took" = "0${newline}0" ]
}

# Appends the bytes of this record to the file $1. True if all of them are there. Where they did not fit, the
# shell passes over the rest, two megabytes a second: so once that was, another process writes, and the rest
# goes nowhere.
store() {
  [ -z "$tight" ] || { give append "$1"; return; }
  took=''
  { take "$length"; took=$?; } >>"$1"
  [ -n "$took" ] || { skip; return 1; }         # it could not be opened
  [ "$took" = 0 ] || tight='tight'
  settle && [ "$took" = 0 ]
}
append() { cat >>"$1"; }

# True if everything above the path $1 is a directory and none of it a link: nothing is written, moved or
# removed through a link. RACE: somebody over there may put a link in after this looked; whoever can do that
# can write in the replica already, and what we then write lands where the link leads.
solid() {
  above=${1%/*}
  case $checked/ in "$above"/*) checked=$above; return 0 ;; esac
  walked=. rest=${above#./}/
  while [ -n "$rest" ]; do
    walked=$walked/${rest%%/*} rest=${rest#*/}
    if [ -h "$walked" ] || [ ! -d "$walked" ]; then echo "what is above it is no directory"; return 1; fi
  done
  checked=$above
}

# True if $1 is a directory of ours in which nothing could be changed, as its mode has it.
closed() {
  [ -O "$1" ] && { [ ! -w "$1" ] || [ ! -x "$1" ]; } && [ -n "$(find "$1" -prune ! -perm -300)" ]
} 2>/dev/null

# True if there is something at $1, a link that leads nowhere too.
stands() { [ -e "$1" ] || [ -h "$1" ]; }

# Sets temp to our name beside the path $1. What stands there goes: ln would go into a directory, or through a
# link to one, that somebody made there.
beside() { temp=${1%/*}/$mark; ! stands "$temp" || rm -f "$temp"; }

# Puts $1 at $2, in one rename. mv would go into a directory, or through a link to one: that makes way. Not
# every mv replaces each link. A file that is a mount point cannot be renamed over: it is written with the
# bytes of one that we made; a link has no bytes, and cat would read what it leads to.
put() {
  [ ! -d "$2" ] || if [ -h "$2" ]; then rm -f "$2"; else rmdir "$2"; fi || return
  mv -f "$1" "$2" 2>/dev/null && return
  # shellcheck disable=SC3013 # GNU's mv puts no link over the very file that it leads to
  if [ -h "$2" ] || { [ -h "$1" ] && [ "$1" -ef "$2" ]; } 2>/dev/null; then rm -f "$2"; fi
  said=$(mv -f "$1" "$2" 2>&1) && return
  case ${said##*: } in                  # the reason: the path before it may have any name
    *[Bb]usy*)
      if [ "$1" = "$temp" ] && [ ! -h "$1" ] && [ -f "$2" ] && [ ! -h "$2" ]; then
        chmod "$(stat -c %a "$1")" "$2" || refused=3
        cat "$1" >"$2" && rm -f "$1" && return
      fi
      ;;
  esac
  echo "$said"
  return 1
}

# Sets the mode $1 and the time $2 (either may be -) of the rest. True if both could be set.
stamp() {
  stamp_mode=$1 stamp_time=$2 stamped=0
  shift 2
  [ "$stamp_mode" = - ] || chmod "$stamp_mode" "$@" || stamped=1
  [ "$stamp_time" = - ] || "$touch" -c -h -d "@$stamp_time" "$@" || stamped=1
  return $stamped
}

# ---- one function for each record; w1 to w4 are the words of its header, the arguments its paths

# file UMASK MODE TIME NAME: replaces what is at the path by the bytes (NAME is -), or by the staged file
# NAME. It is made beside its place, under a name of ours, so that it gets there by a rename on whatever file
# system that is; the umask has it readable for nobody who may not read it in the end. Where a default ACL
# rules, a umask does nothing.
do_file() {
  solid "$1" || { skip; return 2; }
  umask "$w1"
  refused=0
  beside "$1" || { skip; return 1; }    # left where nothing can be removed
  if [ "$w4" = - ]; then
    [ -z "$acl" ] || { true >"$temp" && chmod 600 "$temp"; }
    store "$temp"
  else
    [ -z "$acl" ] || chmod 600 "$stage/$w4"
    mv -f "$stage/$w4" "$temp"
  fi || { rm -f "$temp"; return 1; }
  [ "$w2" = - ] || chmod "$w2" "$temp" || refused=3
  put "$temp" "$1" || { rm -f "$temp"; return 1; }
  stamp - "$w3" "$1" || refused=3
  return $refused
}

# part SEEK NAME: the bytes go to the staged file NAME: they are its first (SEEK is =), go to its end (-), or
# SEEK times 64 KiB into it.
do_part() {
  umask 077
  [ "$w1" = = ] || [ -f "$stage/$w2" ] || { skip; echo "what was staged of it is gone"; return 1; }
  case $w1 in
    = | -) store "$stage/$w2" ;;
    *) give dd ibs=65536 obs=65536 seek="$w1" conv=notrunc of="$stage/$w2" ;;
  esac && return
  rm -f "$stage/$w2"                    # what follows of it need not be tried
  return 1
}

# base NAME BLOCKS SIZE FROM: adds to the staged file NAME what stands at the path FROM times 64 KiB into it,
# BLOCKS blocks of SIZE bytes, and says each one's sum. The sums are of the bytes as they were staged, so a
# change over there meanwhile cannot be patched wrongly; nor can what a full disk left out.
do_base() {
  [ -f "$1" ] && [ ! -h "$1" ] || return 2
  umask 077
  blocks=$w2
  {
    dd ibs=65536 skip="$w4" count=0 2>/dev/null
    while [ "$blocks" -gt 0 ]; do
      printf '%s + ' "$nonce"
      take "$w3" | tee -a "$stage/$w1" | { "$sum" || echo; }
      blocks=$((blocks - 1))
    done
  } <"$1"
  [ "$(stat -c %s "$stage/$w1")" = $((w4 * 65536 + w2 * w3)) ]
}

# dir MODE: makes the path a directory. What is in the way and is none goes.
do_dir() {
  solid "$1" || return 2
  if [ ! -h "$1" ] && [ -d "$1" ]; then
    chmod "$w1" "$1" || return 3
  else
    ! stands "$1" || rm -f "$1" || return 1
    mkdir -m "$w1" "$1" || return 1
  fi
  [ ! -g "$1" ] || chmod g-s "$1"       # which it had, or inherited
}

# link TIME: the first path, less the dot at its end, is where the second shall lead.
do_link() {
  solid "$2" || return 2
  beside "$2" || return 1
  { ln -s -- "${1%.}" "$temp" && put "$temp" "$2"; } || { rm -f "$temp"; return 1; }
  stamp - "$w1" "$2" || return 3
}

# meta MODE TIME: sets them for paths that are there; where one is -, that stays.
do_meta() {
  for p; do
    solid "$p" && stands "$p" || return 2
    [ "$w1" = - ] || [ ! -h "$p" ] || return 2
    [ "$p" != . ] || [ "$w2" = - ] || root_time=$w2
  done
  stamp "$w1" "$w2" "$@"
}

# remove: whatever stands at the paths, what is in a directory before it. A directory that holds what is not
# ours stays; gone already is as good.
do_remove() {
  for p; do
    shift
    ! solid "$p" >/dev/null || set -- "$@" "$p"
  done
  [ $# != 0 ] || return 0
  rm -f "$@" 2>/dev/null && return      # it takes all but directories
  for p; do
    shift
    if [ ! -h "$p" ] && [ -d "$p" ]; then set -- "$@" "$p"; else ! stands "$p" || rm -f "$p" || return; fi
  done
  [ $# = 0 ] || rmdir "$@"
}

# move: the first path becomes the second, with all that is in it.
do_move() {
  solid "$1" && solid "$2" && stands "$1" || return 2
  put "$1" "$2" || return
  # Of two names of one file a rename leaves both. Where A and a are one name, it is the only one.
  [ ! -h "$1" ] && [ ! -f "$1" ] || [ "$(stat -c %h "$1")" = 1 ] || rm -f "$1"
}

# bulk KIND: an archive (tar), or lines that write the same files (script), of b/1/..., b/2/...: what is in
# b/N belongs in the directory that is the Nth path. All is staged, then moved, so each file is replaced at
# once.
do_bulk() {
  umask 022
  if [ "$w1" = tar ]; then
    give unpack
  else
    # shellcheck disable=SC1091 # s is what was just stored
    store "$stage/s" && (cd "$stage" && failed=0 && . ./s && [ "$failed" = 0 ])
  fi || { scrap "$stage/b" "$stage/s"; return 1; }
  # GNU's tar leaves a directory of mode 0700 the setgid bit that it inherited.
  [ ! -g "$stage" ] || find "$stage/b" -type d -perm -2000 -exec chmod g-s {} +
  for p; do solid "$p/." || { scrap "$stage/b" "$stage/s"; return 2; }; done
  number=0 failed=0
  for p; do
    number=$((number + 1))
    made=$stage/b/$number
    { into "$p" "$made"/* && into "$p" "$made"/.[!.]* && into "$p" "$made"/..?*; } || failed=1
  done
  # What stayed would be lost: yash's patterns match no name that is no text of its locale.
  if [ "$failed" = 1 ] || ! rmdir "$stage"/b/* "$stage/b" 2>/dev/null; then failed=1; scrap "$stage/b"; fi
  [ "$w1" = tar ] || scrap "$stage/s"
  return $failed
}

# Unpacks an archive into the staging.
unpack() { cd "$stage" && umask 0 && run_tar xpof -; }

# Moves the rest into the directory $1. A pattern that matched nothing has stayed itself, and is no file.
into() {
  directory=$1
  shift
  ! stands "$1" || mv -f "$@" "$directory/"
}

# hook: runs the command the session was given for it; its standard input is the bytes of this record, not the
# stream.
do_hook() {
  scrap "$stage/hook"
  umask 077
  store "$stage/hook" || return 1
  echo "$nonce + begun"
  {
    unstage                             # it holds nothing else now, and git clean, as a hook, would take it
    (
      trap - 0 HUP INT TERM PIPE
      unset FILE_REPLICATOR
      umask 022
      LC_ALL=$locale exec sh -c "$hook" <&3 3<&-
    )
  } 3<"$stage/hook" && return
  printf '\nit ended with status %s\n' $?         # behind a last line that may lack its newline
  return 1
}

# beat: nothing, to see whether the connection lives.
do_beat() { :; }

# Lists the stagings of other sessions.
others() {
  for old in ./.file_replicator.????????????; do
    case ${old#./.file_replicator.} in "$nonce" | *[!0-9a-f]*) ;; *) echo "$old" ;; esac
  done
}

# Makes the staging, for what is put together there before it takes its place. Another session's goes: a
# connection that was given up may still have bytes on the way, and without its staging its receiver ends
# instead of writing them. What stands at our name goes too: since the last rest others may know it. True if
# it is there.
make_stage() {
  [ -z "$staged" ] || return 0
  umask 077
  ! stands "$stage" || rm -rf "$stage"
  mkdir "$stage" 2>/dev/null && staged=1        # before others go: of two at once, one must notice
  for old in $(others); do
    mv "$old" "$stage/old" 2>/dev/null          # since rm alone fails where somebody still writes
    rm -rf "$old" "$stage/old"
  done
  [ -n "$staged" ] || mkdir "$stage" || return  # on a full disk another one took the room
  staged=1
  [ -z "$acl" ] || chmod 700 "$stage" 2>/dev/null || :
}

# Ends the session whose staging another one took away.
keep_stage() { [ -z "$staged" ] || [ -d "$stage" ] || give_up "its staging was taken away"; }

# rest: removes the staging, until there is more to do.
do_rest() { rm -rf "$stage" && staged=''; }

# probe: makes the staging and says what this side can do, found out by use.
do_probe() {
  make_stage || return 1
  many=x                                # 131072 of them, and a newline
  for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17; do many=$many$many; done
  for way in 1 2 3 4 5; do
    taker=$way
    echo "$many" | { take 70000 2>/dev/null | wc -c; wc -c; } |
      { read -r a && read -r b && [ "$a$b" = 7000061073 ]; } && break
  done
  [ "$taker" != 5 ] || command -v dd >/dev/null || { echo "dd: not found"; return 1; }
  command -v rm >/dev/null || { echo "rm: not found"; return 1; }
  umask 077
  mkdir "$stage/p" || return 1
  case $(stat -c %a "$stage/p") in *700) acl='' ;; *) acl=acl; chmod 700 "$stage" 2>/dev/null ;; esac
  { echo probe >"$stage/p/p"; } 2>/dev/null     # not on a full disk, but what is to go can go
  fine=fine
  if ! touch -d @1.5 "$stage/p" 2>/dev/null; then
    if find_tool touch && "$found" -d @1.5 "$stage/p" 2>/dev/null; then touch=$found; else fine=whole; fi
  fi
  touch -d @1 "$stage/p/p" "$stage/p"
  ! find_tool tar || tar=$found
  can=script pax=''
  [ "$fine" = whole ] || pax='--format=pax'     # a tar that does not know it loses the fractions of times
  # GNU's takes a default ACL for the mode
  if [ -z "$acl" ] && { has_tar || { tar='busybox' applet='tar'; has_tar; }; }; then
    can='tar'
    [ "$(stat -c %Y "$stage/x/p")" != 1 ] || can=tar+           # busybox's sets no times of directories
  fi
  find_sum
  rm -rf "$stage/x" "$stage/p"
  echo "$nonce + $can $fine $sum ${acl:--}"
}

# The tar that was found: a tool, or what busybox has though no link to it is named so.
run_tar() { "$tar" ${applet:+"$applet"} "$@"; }

# True if it works: it unpacks into x what it packed, with its time, which FUSE may lose though GNU's tar set
# it.
has_tar() {
  (cd "$stage" && run_tar -cf - ${pax:+"$pax"} p | { mkdir -p x && cd x && run_tar xpof - && [ -s p/p ]; } &&
    [ "$(stat -c %Y x/p/p)" = 1 ])
} 2>/dev/null

# Sets found to the file of the tool $1 in PATH. A standalone busybox uses its own tools and never looks
# there, but GNU's find and touch know fractions of a second and its tar sets them.
find_tool() {
  rest=$PATH:
  while [ -n "$rest" ]; do
    found=${rest%%:*}/$1
    rest=${rest#*:}
    [ ! -f "$found" ] || [ ! -x "$found" ] || return 0
  done
  return 1
}

# Sets sum to the best tool there is that makes sums, or to -.
find_sum() {
  for tool in sha256sum sha1sum md5sum -; do
    sum=$tool                           # yash forgets the variable of a loop with its function
    ! "$sum" </dev/null >/dev/null 2>&1 || break
  done
}

# Lists the replica: kind, mode, size, time, file system, path, two slashes, where a link leads, a dot and the
# nonce: what somebody prints behind that is none of it. The arguments are find's, for what is left out.
list() {
  find_tool find || found="find"
  "$found" . "$@" -printf "$nonce %y %m %s %T@ %D %p//%l.$nonce\n" 2>/dev/null && return
  ended=$?
  if "$found" . -maxdepth 0 -printf '%y %m %s %T@ %D %p%l' >/dev/null 2>&1; then     # toybox knows no %y
    was_killed $ended
  else
    find . "$@" ! -type l -exec stat -c "$nonce x%f - %s %Y %d %n//.$nonce" {} + || was_killed $?
    # shellcheck disable=SC2016 # the inner shell expands it
    find . "$@" -type l -exec sh -c 'for l; do
      printf "%s %s %s//%s\n" "$0" "$(stat -c "x%f - %s %Y %d" "$l")" "$l" "$(readlink -n "$l"; echo ".$0")"
    done' "$nonce" {} + || was_killed $?
  fi 2>/dev/null
}

# Ends the session if find, which ended with the status $1, did not come to its end: what it did not list
# would be taken not to be there. What it cannot enter is no reason.
was_killed() { [ "$1" -lt 126 ] || give_up "find, which lists the replica, ended with status $1"; }

# Says where the replica is, and what is mounted anywhere: nothing of that is removed. A bind mount shows in
# no other way.
list_mounts() {
  printf '%s at %s.%s\n' "$nonce" "$root" "$nonce"
  echo "$nonce mounts"
  cat /proc/self/mounts 2>/dev/null
}

# Ends what is left of the session $1: bytes may still be on their way to its shell, as behind docker, or a
# tool of it be at work yet, and both would change what we have looked at. A shell is known by the call it
# began with, a tool by its environment.
end_session() {
  for left in $(grep -ls "main \"[$]0\" $1" /proc/[0-9]*/cmdline
                grep -ls "FILE_REPLICATOR=$1" /proc/[0-9]*/environ); do
    left=${left#/proc/}
    kill -9 "${left%%/*}"
  done 2>/dev/null
}

# True if nothing is in the replica.
empty() { for p in * .[!.]* ..?*; do ! stands "./$p" || return 1; done; }

# The session: $1 the text of this program, which goes on in the best shell there is, or - where that is this
# one; $2 the nonce all answers begin with, $3 the replica, $4 the letters of what it may do (g guards root
# and home, c sums, d dry run), $5 the remote hook, $6 the nonce of the session before, the rest for list.
main() {
  newline='
'
  set +e +f +u +v +x +C
  # A function that a bash took from its environment is no tool.
  case ${BASH_VERSION-} in
    ?*) unset -f '[' busybox cat cd chmod command dash dd echo false find grep head ln md5sum mkdir mv \
          printf pwd read readlink rm rmdir sh sha1sum sha256sum stat tar tee test touch true umask wc ;;
  esac
  [ "$1" = - ] || FILE_REPLICATOR=$LC_ALL       # what the hook gets back
  LC_ALL=C
  export LC_ALL FILE_REPLICATOR
  unset CDPATH IFS TAR_OPTIONS
  # Of what was there only whole paths stay: no file of the replica may be taken for a tool.
  rest=$PATH: whole=''
  while [ -n "$rest" ]; do
    case $rest in /*) whole=$whole${rest%%:*}: ;; esac
    rest=${rest#*:}
  done
  PATH=$whole/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  # A busybox that needs no process for its tools is four times as fast as any other shell, dash a little
  # faster.
  if [ "$1" != - ]; then
    # shellcheck disable=SC2016
    lean='PATH=/nonexistent; stat -c %s / && type dd find mv rm tee wc'
    ! busybox sh -c "$lean" >/dev/null 2>&1 || exec busybox sh -c "$1" -
    ! command -v dash >/dev/null || exec dash -c "$1" -
    exec sh -c "$1" -
  fi
  nonce=$2 root=$3 flags=$4 hook=$5
  [ ! -t 0 ] || give_up "the connection goes through a terminal, which changes bytes; leave out -t"
  [ "$6" = - ] || end_session "$6"
  locale=$FILE_REPLICATOR FILE_REPLICATOR=$nonce
  shift 6
  mark=.file_replicator.$nonce-new stage=./.file_replicator.$nonce staged='' temp='' acl='' root_time=''
  touch='touch' tar='tar' applet='' tight=''
  exec 2>&1
  if [ -h "$root" ] || [ ! -d "$root" ]; then
    case $flags in *d*) echo; echo "$nonce ready"; echo "$nonce listed"; exit ;; esac
    ! stands "$root" || rm -f "$root" || give_up "cannot remove what stands where the replica is to be"
    umask u=rwx
    mkdir -p "$root" || give_up "cannot make the directory"
  fi
  cd "$root" || give_up "cannot enter the directory"
  root=$(pwd -P; echo .)
  root=${root%"$newline".}
  case $flags in
    *g*) home=$(cd "${HOME:-/}" 2>/dev/null && pwd -P)
         [ "$root" != / ] || give_up "that is the whole file system"
         case $home/ in "$root"/*) give_up "that is or holds the home directory over there" ;; esac ;;
  esac
  trap leave 0 HUP INT TERM PIPE
  echo
  echo "$nonce ready"
  # The session of a staging may still be at work, though who started it was killed: by the probe it ends
  # before we list. Where that fails, the next one says why.
  case $flags in
    *d*) ;;
    *) if empty || [ -n "$(others)" ]; then do_probe; fi ;;
  esac
  list_mounts
  list "$@"
  case $flags in
    *c*) find_sum
         echo "$nonce sums $sum"
         find . "$@" -type f -exec "$sum" {} + 2>/dev/null ;;
  esac
  echo "$nonce listed"
  while read -r verb id count w1 w2 w3 w4; do
    set --
    while [ "$count" -gt 0 ]; do
      get
      set -- "$@" "$p"
      count=$((count - 1))
    done
    read -r length marker || leave
    at_home || give_up "the replica is gone"
    keep_stage
    checked='' temp=''
    if case $verb in part | base | bulk | hook) make_stage ;; esac; then "do_$verb" "$@"; else skip; false; fi
    code=$?
    keep_stage
    [ "$code" -lt 4 ] || code=1         # of a tool that was killed, or is not there
    case $code$verb in
      1bulk | 1meta) ;;                 # done in part elsewhere, perhaps; and meta needs no such mode
      1*) [ -z "$checked" ] || ! closed "$checked" || code=2 ;;         # we had opened it: somebody closed it
    esac
    echo "$nonce $id $code"
  done
}
'''


# ==== 2. Words ==============================================================================================

BULK_BYTES = 1 << 20            # the largest file that travels whole; over a slow link less
BULK_PATHS = 1000               # in one record, at most
RECORD_BYTES = 4 << 20          # of the backlog in one record, at most: large ones save processes over there
PART_BYTES = 16 << 20           # the same of a large file, of which nothing is in memory here
LEAST_BYTES = 1 << 14           # the same, however slow the link
SCRIPT_BYTES = 1 << 16          # the largest file that a far side without tar gets as a line of its shell
SCRIPT_UMASK = 0o022            # see do_bulk in the receiver
LIST_PATHS = 128                # paths in one remove or meta record, and in one command
BLOCK = 1 << 16                 # parts of a large file begin at multiples of this
SUMS_BYTES = 8 << 20            # of a large file whose sums are asked for in one record
JOBS = 8                        # large files on their way at once
PIPE_BYTES = 1 << 20            # asked of the kernel for the pipes to the connection command
WINDOW_BYTES = 32 << 20         # on the way and not answered, at most
CROWD = 32                      # records on their way, at which changes are gathered
READY_SECONDS = 40              # for the far side to answer at all
BEAT_SECONDS, SILENT_SECONDS = 12, 25   # idle before a heartbeat, waiting before a connection is given up
SLOW_SECONDS = 3600             # the same for a hook, for all sums, and for a copy to another file system
QUIET_SECONDS = 0.2             # without another write before a file that is still open is sent,
OPEN_SECONDS, NEW_SECONDS = 0.9, 5      # but no longer than this: known files, files never sent
RETRY_SECONDS, RETRY_MOST_SECONDS = 1, 30
GIVE_UP_SECONDS = 300           # of connections that end too early, where nobody watches
REASON_SECONDS, REASONS_MOST = 10, 5    # without a connection before another reason is said; how many are
UNSTABLE_MOST = 12              # readings of a file that changes, where nobody watches
LINE = 500                      # characters of one that the connection command said
SAID_BYTES, SAID_LINES = 1 << 24, 1000  # of what is no answer: no shell says more before it begins; are kept
GIT_TRIES = 3                   # of a git that fails or is killed
TIME_UNITS = 100, 10**3, 10**6, 10**9   # nanoseconds: what some file systems and tools round times down to
DRIFTS_MOST = 9                 # in a row: then what is not as it was listed is an error like any other
POLL_SECONDS = 2                # between two looks at everything, where there is no inotify
STAGING = re.compile(r'\.file_replicator\.[0-9a-f]{12}(-new)?')

# what a hint says: the mode or time changed; look; it may be another file, so its inode counts; bytes changed
# (or: look below)
META, LOOK, OTHER, CONTENT = 1, 2, 3, 4


Options = argparse.Namespace    # what parse() returns: the options by name, source, destination, command


class Stop(Exception):
    """The program cannot go on; the text is the message."""


class Stopped(BaseException):
    """A signal, or the end of who reads our output, asked us to end."""


class Signals:
    """Whether one asked us to end. It is raised as Stopped where it arises; where that has to wait, or was
    swallowed, as in a callback of Python's own, at the next turn."""
    asked = held = False


class Lost(Exception):
    """This connection cannot go on; the text says why. Another may."""


class Drifted(Lost):
    """The far side is no longer what it listed: somebody changed the replica there. A new connection lists it
    anew."""


class Entry(NamedTuple):
    """What stands at a path. Their order counts: [:5] is what the far side lists, [:6] all but the ctime."""
    kind: str                   # 'f', 'd', 'l', or '?': not known, something of ours or nothing
    mode: int = 0               # permission bits, 0 to 0o7777
    size: int = 0               # bytes; 0 for all but files
    mtime_ns: Optional[int] = None      # None: not known, so different from any
    target: str = ''            # where a link leads
    inode: Optional[Tuple[int, int]] = None     # device and inode here; None: seen only over there
    ctime_ns: int = 0           # when anything of it last changed here


UNKNOWN = Entry('?')


def bulk_size(entry: Optional[Entry]) -> int:
    """How many of its bytes travel whole; a large file travels in parts, by itself."""
    return entry.size if entry is not None and entry.size <= BULK_BYTES else 0


class Step(NamedTuple):
    """One change to the replica."""
    verb: str                   # dir, file, link, meta, remove, move
    path: str
    entry: Optional[Entry]      # what stands there afterwards; None for nothing
    detail: str = ''            # move: from where; meta: 'm' the mode, 't' the time, 'mt' both
    before: Optional[Entry] = None      # what stood at the path


def is_news(step: Step) -> bool:
    """Whether a step is worth a line: a directory's time changes with each thing in it."""
    return step.verb != 'meta' or 'm' in step.detail or step.entry.kind == 'f'


def is_passing(step: Step) -> bool:
    """Whether a meta step sets a mode that is there only meanwhile: the last one comes with or behind it."""
    return step.entry.mtime_ns is None


class Tree:
    """What stands below a directory: paths are relative to it, '' is itself. Each lookup costs the same,
    however large the tree; a subtree costs what is in it."""

    def __init__(self):
        self.entries: Dict[str, Entry] = {}
        self.inside: Dict[str, Dict[str, None]] = {'': {}}      # directory: the paths right in it
        self.get: Callable[[str], Optional[Entry]] = self.entries.get

    def put(self, path: str, entry: Optional[Entry]) -> None:
        """Sets what stands at a path whose directory is in the tree; elsewhere it does nothing. What was
        below stays only below what is, or may be, a directory."""
        beside = self.inside.get(parent(path))
        if beside is None:
            return
        if path in self.inside and path and (entry is None or entry.kind not in 'd?'):
            for gone in [path, *self.below(path)]:
                self.entries.pop(gone, None)
                self.inside.pop(gone, None)
        if entry is None:
            self.entries.pop(path, None)
            beside.pop(path, None)
            return
        self.entries[path] = entry
        if path:
            beside[path] = None
            if entry.kind in 'd?':
                self.inside.setdefault(path, {})

    def below(self, top: str) -> Iterator[str]:
        """Every path below a directory, sorted within each, what is above before what is in it."""
        stack = [top]
        while stack:
            path = stack.pop()
            if path != top:
                yield path
            if path in self.inside:
                stack += sorted(self.inside[path], reverse=True)

    def move(self, old: str, new: str) -> None:
        """Renames, with all that is below."""
        moved = [(new + path[len(old):], self.get(path)) for path in [old, *self.below(old)]]
        self.put(old, None)
        for path, entry in moved:
            self.put(path, entry)

    def is_directory(self, path: str) -> bool:
        return not path or (self.get(path) or UNKNOWN).kind == 'd'


def parent(path: str) -> str:
    return path.rpartition('/')[0]


def ancestors(path: str) -> Iterator[str]:
    """The directories a path is in, the topmost first, without the root."""
    return (path[:at.start()] for at in re.finditer('/', path))


def is_below(path: str, directories: Collection[str]) -> bool:
    """Whether a path is in one of these directories, at any depth."""
    return bool(directories) and (
        '' in directories or any(directory in directories for directory in ancestors(path)))


def is_staging(path: str) -> bool:
    """Whether a path is named as what a receiver makes on the way."""
    return bool(STAGING.fullmatch(path.rpartition('/')[2]))


def shown(path: str) -> str:
    """A path for people: what a terminal could take for a command is escaped, whatever the locale."""
    if path.isprintable() and '\\' not in path:
        return path or '.'
    return ''.join(c if c.isprintable() and c != '\\' else
                   '\\x%02x' % (ord(c) - 0xdc00) if 0xdc80 <= ord(c) <= 0xdcff else
                   c.encode('unicode_escape').decode() for c in path)


# ==== 3. What is left out ===================================================================================

def pattern_regex(pattern: str) -> Tuple[Pattern, bool]:
    """The expression that whole paths match, and whether only directories do. Raises ValueError for an empty
    one."""
    def expression(found) -> str:
        special = {'**/': '(?:.*/)?', '**': '.*', '*': '[^/]*', '?': '[^/]'}
        if not found[2]:
            return special.get(found[0]) or re.escape(found[0])
        ranges = re.findall('(?s)(.)-(.)|(.)', found[2])
        if '[:' in found[2] or any(low > high for low, high, _ in ranges):
            raise ValueError('[%s] is neither a list nor a range' % found[2])
        return '(?!/)[%s%s]' % ('^' * bool(found[1]), ''.join(
            re.escape(one) or re.escape(low) + '-' + re.escape(high) for low, high, one in ranges))

    body = pattern.strip('/')
    if not body or {'.', '..'}.intersection(body.split('/')):
        raise ValueError('it is empty, or has a . or .. in it, which no path here has')
    # a **/ that begins a name, others, and a class, whose first character may be ]
    out = re.sub(r'(?s)(?<![^/])\*\*/|\*\*|\[([!^]?)(.[^]]*)\]|.', expression, body)
    anchored = '/' in pattern.rstrip('/')
    return re.compile(('' if anchored else '(?:.*/)?') + out, re.DOTALL), pattern.endswith('/')


def is_behind_link(root: str, path: str) -> bool:
    """Whether anything above a path is a link here, below this root."""
    return any(os.path.islink(os.path.join(root, above)) for above in ancestors(path))


@contextlib.contextmanager
def needing_room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Stop('git cannot be asked what to leave out, since that needs a directory for temporary files: '
                   '%s; set TMPDIR, or use --no-gitignore' % error)


AT_END = contextlib.ExitStack()         # what is to be cleared up before we end


@functools.lru_cache(maxsize=None)
def empty_repository() -> str:
    """Git reads a .gitignore only where there is a repository: this is one, elsewhere, until we end."""
    import tempfile
    with needing_room():
        top = AT_END.enter_context(tempfile.TemporaryDirectory(prefix='file_replicator.git.'))
        AT_END.callback(empty_repository.cache_clear)
        for name in ('objects', 'refs'):
            os.mkdir(os.path.join(top, name))
        with open(os.path.join(top, 'HEAD'), 'w') as file:
            file.write('ref: refs/heads/none\n')
    return top


# of ls-files -t -s: a submodule, or rules that are not checked out
IN_INDEX_ONLY = re.compile(rb'(?:^|\0)(?:. 160000 |S [^\t]*\t(?:[^\0]*/)?\.gitignore\0)')


class Git:
    """What git ignores in one work tree, or in a directory that is in none, as rules and index are now."""

    unknown = False                     # whether to leave out what it does not judge
    went = False                        # whether the directory was not there when it was asked

    def __init__(self, top: str):
        self.top = os.path.abspath(top)
        self.environment = {name: value for name, value in os.environ.items()
                            if not name.startswith('GIT_') or name.startswith('GIT_CONFIG')}
        self.environment['LC_ALL'] = 'C'
        self.asking: Optional[subprocess.Popen] = None
        self.above: List[str] = []      # from here to the top of the work tree: they have rules too
        self.directory = self.find_directory()
        if not self.directory:
            self.use_empty_repository()
        elif not self.above and os.path.lexists(self.directory + '/HEAD'):      # else git looks further up
            # Not where its settings say: a submodule that was moved is here.
            self.environment['GIT_WORK_TREE'] = os.path.realpath(self.top)

    def rule_directories(self) -> List[str]:
        """Where rules stand, or the index, outside of the work tree or above its directories."""
        if not self.directory:
            return []
        directories = [self.directory]
        with contextlib.suppress(OSError), open(os.path.join(self.directory, 'commondir')) as file:
            # of a linked work tree: where the repository is
            directories.append(os.path.join(self.directory, file.read().strip()))
        return [*directories, os.path.join(directories[-1], 'info'), *self.above]

    def find_directory(self) -> str:
        """Git's own directory of this work tree; '' if there is none."""
        at, below = os.path.realpath(self.top), ''
        while at != below:
            git = os.path.join(at, '.git')
            if os.path.isdir(git):
                return git
            if os.path.isfile(git):         # a linked work tree or a submodule
                with contextlib.suppress(OSError), open(git, errors='surrogateescape') as file:
                    return os.path.join(at, file.read().partition('gitdir: ')[2].strip())
            at, below = os.path.dirname(at), at
            self.above.append(at)
        return ''

    def use_empty_repository(self) -> None:
        self.environment.update(GIT_DIR=empty_repository(), GIT_WORK_TREE=self.top)

    def run(self, *words: str, given: bytes = b'') -> bytes:
        for _ in range(GIT_TRIES):      # a repository may be in the making
            done = self.start(subprocess.run, *words, input=given, stderr=subprocess.PIPE)
            if done.returncode in (0, 1):       # 1 is how check-ignore says none; below 0 it was killed
                return done.stdout
            if not os.path.isdir(self.top):
                self.went = True
                return b''
            if b'not a git repository' in done.stderr and 'GIT_DIR' not in self.environment:
                self.use_empty_repository()
            else:
                time.sleep(0.1)
        raise Stop('git cannot say what to leave out of %s: %s; mend that, or use --no-gitignore'
                   % (shown(self.top), shown(os.fsdecode(done.stderr).strip().replace('\n', ' '))))

    def start(self, how: Callable, *words: str, **more: Any) -> Any:
        try:
            return how(['git', '-C', self.top, *words], env=self.environment, stdout=subprocess.PIPE, **more)
        except OSError as error:
            raise Stop('cannot run git, which says what to leave out: %s; install it, or use --no-gitignore'
                       % error.strerror)

    def ignored(self) -> Iterator[str]:
        """What git leaves out, relative to the top ('.'); of an ignored directory that holds nothing tracked
        only itself. ls-files also names directories that hold only ignored files, and are not ignored: so it
        is asked again; with a ./ before each name, which else could be taken for a pattern of git's."""
        out = self.run('ls-files', '-z', '--others', '--ignored', '--exclude-standard', '--directory')
        paths = out.split(b'\0')[:-1]
        directories = b'\0'.join(b'./' + path[:-1] for path in paths if path.endswith(b'/'))
        if directories:
            out = self.run('check-ignore', '--no-index', '-z', '--stdin', given=directories)
            really = set(out.split(b'\0'))
            paths = [path for path in paths if not path.endswith(b'/') or b'./' + path[:-1] in really]
        return (os.fsdecode(path).rstrip('/') for path in paths)

    def ignores(self, paths: Sequence[str]) -> Set[str]:
        """Which of these new paths, relative to the top, git leaves out: not what holds tracked files."""
        matching = list(filter(self.matches, paths))
        tracked: Set[str] = set()
        for at in range(0, len(matching), LIST_PATHS):
            some = [':(literal)' + path for path in matching[at:at + LIST_PATHS]]
            for name in map(os.fsdecode, self.run('ls-files', '-z', '--', *some).split(b'\0')):
                tracked.update((name, *ancestors(name)))
        return set(matching) - tracked

    def matches(self, path: str) -> bool:
        """Whether a pattern has a path left out: one process answers all through. It ends at a path in a
        submodule, or behind a link: those are not its to judge."""
        for _ in range(GIT_TRIES):
            fields = self.answer(path)
            if len(fields) > 4:         # source, line, pattern, path, each with a NUL behind
                return bool(fields[2]) and not fields[2].startswith(b'!')
            ended = self.asking.wait()
            self.close()
            if ended >= 0:              # below, it was killed
                self.went = not os.path.isdir(self.top)
                return self.unknown
        # Some versions crash where they tell the source of a pattern above some twenty directories.
        return bool(self.run('check-ignore', '-z', '--stdin', given=b'./' + os.fsencode(path) + b'\0'))

    def answer(self, path: str) -> List[bytes]:
        """What check-ignore says of a path, field by field; fewer than there should be where it ended."""
        if self.asking is None:
            # With the index it takes the longer for each path the larger that is.
            index = self.run('ls-files', '-t', '-s', '-z', '--', ':(top)')
            words = [] if IN_INDEX_ONLY.search(index) else ['--no-index']
            self.asking = self.start(
                subprocess.Popen, 'check-ignore', '-z', '--stdin', '--verbose', '--non-matching', *words,
                stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        with contextlib.suppress(BrokenPipeError):
            self.asking.stdin.write(b'./' + os.fsencode(path) + b'\0')
        answer, more = b'', b'?'
        while more and answer.count(b'\0') < 4:
            more = self.asking.stdout.read(65536)
            answer += more
        return answer.split(b'\0')

    def close(self) -> None:
        """Ends what answers. It may be waiting for what never comes: a .gitignore can be a FIFO."""
        asking, self.asking = self.asking, None
        if asking is not None:
            asking.kill()
            with contextlib.suppress(BrokenPipeError), asking:      # closes its pipes, and waits for it
                pass


class RulesAlone(Git):
    """The rules of a work tree in a directory where nothing else stands: of what is behind a link git says
    nothing, but what stands over there may be behind what is a link only here. What git cannot judge even so
    is left out."""

    unknown = True

    def __init__(self, git: Git):
        import tempfile
        self.directory, self.above, self.asking = git.directory, git.above, None
        self.here = os.path.realpath(git.top)
        self.work_tree = self.above[-1] if self.directory and self.above else self.here
        with needing_room():
            self.room = tempfile.TemporaryDirectory(prefix='file_replicator.git.')
            AT_END.callback(self.room.cleanup)  # which may have been done by then
        self.top = os.path.join(self.room.name, os.path.relpath(self.here, self.work_tree))
        self.environment = {'GIT_DIR': self.directory, **git.environment, 'GIT_WORK_TREE': self.room.name}
        self.above_paths: Set[str] = set()      # directories whose rules are copied, where they are ones here
        for directory in [self.here, *(self.above if self.directory else ())]:
            self.copy_rules(directory)

    def copy_rules(self, directory: str) -> None:
        there = os.path.join(self.room.name, os.path.relpath(directory, self.work_tree))
        rules = None                    # none here: git may know some from its index
        with contextlib.suppress(OSError), open_plain(directory + '/.gitignore') as file:
            rules = file.read()
        with needing_room():
            os.makedirs(there, exist_ok=True)
            if rules is not None:
                with open(there + '/.gitignore', 'wb') as file:
                    file.write(rules)

    def ignores(self, paths: Sequence[str]) -> Set[str]:
        above = {directory for path in paths for directory in ancestors(path)}
        for directory in above - self.above_paths:
            full = os.path.join(self.here, directory)
            if os.path.isdir(full) and not is_behind_link(self.here, directory + '/'):
                self.copy_rules(full)
        self.above_paths |= above
        return super().ignores(paths)


class LeftOut:
    """What is not replicated: by --exclude, and by git where it is asked to say."""

    def __init__(self, root: str, patterns: Sequence[str], ask_git: bool):
        self.root = root
        self.patterns = [(pattern, *pattern_regex(pattern)) for pattern in patterns]
        self.ask_git = ask_git
        self.git: Dict[str, Git] = {}       # the top of each work tree below the root: what knows it
        self.alone: Dict[str, RulesAlone] = {}
        self.ignored: Set[str] = set()
        # paths, since only those show what a rename would take along: out of patterns, what was ever found to
        # be left out, and what stood over there and was not ours
        self.known = {pattern.strip('/') for pattern in patterns if '/' in pattern.rstrip('/')}
        self.has_git = any(os.access(os.path.join(d, 'git'), os.X_OK) for d in os.get_exec_path())

    def refresh(self) -> bool:
        """Asks git anew about everything. True if the answer is another than before. Raises Stop."""
        before, self.ignored = self.ignored, set()
        self.known.update(before)
        tops = list(self.git) or ['']
        self.close()
        if self.ask_git and self.has_git:
            for top in tops:
                if not top or os.path.lexists(os.path.join(self.root, top, '.git')):
                    self.add_work_tree(top)
        if '.' in self.ignored:
            raise Stop('git ignores all of %s; --no-gitignore replicates it' % shown(self.root))
        return before != self.ignored

    def add_work_tree(self, top: str) -> None:
        git = self.git[top] = Git(os.path.join(self.root, top))
        self.ignored.update((top + '/' + path if top else path) for path in git.ignored())

    def enter(self, directory: str, paths: Collection[str]) -> bool:
        """Takes note of a directory's own repository, which is among the paths in it. True if that is new.
        Raises Stop."""
        git = directory + '/.git' if directory else '.git'
        if not self.git or git not in paths or directory in self.git:
            return False
        self.add_work_tree(directory)
        return True

    def __call__(self, path: str, is_directory: bool) -> bool:
        """Whether a path is left out, as far as git was last asked."""
        if path in self.ignored or self.ask_git and (path == '.git' or path.endswith('/.git')):
            return True
        return bool(self.patterns) and any(
            regex.fullmatch(path) for _, regex, only_directories in self.patterns
            if is_directory or not only_directories)

    def ask(self, paths: List[str], gone: bool = False) -> None:
        """Asks git about paths it was not asked about before. Of those that are gone here (they stand over
        there) git cannot tell a directory from a file, but it can for what would be in it."""
        self.ignored.difference_update(paths)           # another thing may have stood there
        inside: Dict[str, List[str]] = {}       # top of a work tree: paths in it, relative to it
        for path in paths if self.git else ():
            top = parent(path)
            while top not in self.git:
                top = parent(top)
            inside.setdefault(top, []).append(path[len(top) + 1:] if top else path)
        for top, names in inside.items():
            if gone:
                inner = self.ignores_gone(top, [name + '/.\x7f' for name in names])
                ignored = self.ignores_gone(top, names).union(name[:-3] for name in inner)
            else:
                ignored = self.git[top].ignores(names)
            self.ignored.update(top + '/' + name if top else name for name in ignored)

    def ignores_gone(self, top: str, names: List[str]) -> Set[str]:
        """Which of these paths in a work tree, that may be behind a link here, git leaves out."""
        behind = {name for name in names if is_behind_link(os.path.join(self.root, top), name)}
        ignored = self.git[top].ignores([name for name in names if name not in behind])
        if behind:
            self.alone[top] = self.alone.get(top) or RulesAlone(self.git[top])
            ignored |= self.alone[top].ignores(list(behind))
        return ignored

    def within(self, path: str, is_directory: bool = False) -> bool:
        """Whether a path or anything above it is left out: for paths that stand only over there."""
        return any(self(directory, True) for directory in ancestors(path)) or self(path, is_directory)

    def may_move(self, old: str, new: str) -> bool:
        """Whether all in a directory that is left out would be at another place too, as far as is known. Else
        it would be written over there, or removed."""
        inside = [path for path in (*self.known, *self.ignored) if path.startswith(old + '/')]
        if not inside:
            return True
        moved = {path: new + path[len(old):] for path in inside}
        kept, self.ignored = self.ignored, self.ignored.copy()          # as it would be is not as it is
        self.ask(list({*moved, *moved.values()} - kept), gone=True)
        outcome = all(self.within(moved[path], True) or not self.within(path, True) for path in inside)
        self.ignored = kept
        return outcome

    def find_words(self) -> List[str]:
        """What the far side's find need not enter, as its words; only where they mean the same to find."""
        words: List[str] = []
        room = 50000                    # no argument may be longer than 128 kB, receiver and all
        for pattern in ['.git'] * self.ask_git + [pattern for pattern, _, _ in self.patterns]:
            name = pattern.rstrip('/')
            if not re.search(r'[][/?\\]|\*\*', name):
                kind = ['-type', 'd'] if pattern.endswith('/') else []
                room -= len(name) + 40
                if room < 0:
                    break
                words += ['!', '-name', '.', *kind, '-name', name, '-prune', '-o']
        for path in sorted(self.ignored, key=len)[:100]:
            if len(path) >= 160:
                break
            words += ['-path', './' + re.sub(r'([][*?\\])', r'\\\1', path), '-prune', '-o']
        return words

    def close(self) -> None:
        for each in (*self.git.values(), *self.alone.values()):
            each.close()
        for alone in self.alone.values():
            alone.room.cleanup()
        self.git.clear()
        self.alone.clear()


# ==== 4. Look: what stands here, and where to look again ====================================================

KINDS = {stat.S_IFREG: 'f', stat.S_IFDIR: 'd', stat.S_IFLNK: 'l'}  # all else is 's': a socket, FIFO or device
GONE_NS = 1 << 62               # when what is gone was made: it is no older than anything
TICK_NS = 50 * 10**6            # by which the time of a file may lag behind the clock, at most
# of git's own directory, and of those above the root; the last two come with a new repository
RULES = '.gitignore', 'exclude', 'index', 'config', 'config.worktree', 'HEAD', 'info'
GONE = errno.ENOENT, errno.ENOTDIR, errno.ELOOP         # the last two: what was above is now no directory
UNMOUNTED = -1, -1              # the identity of a root that no directory has
LOOKS = 10                      # in a row, while there are new events, before what was seen is sent


def entry_of(status: os.stat_result) -> Entry:
    """The entry for what was looked at, but for where a link leads."""
    mode = status.st_mode
    kind = KINDS.get(mode & 0o170000, 's')
    return Entry(kind, mode & 0o7777, status.st_size if kind == 'f' else 0, status.st_mtime_ns, '',
                 (status.st_dev, status.st_ino), status.st_ctime_ns)


@functools.lru_cache(maxsize=None)
def statx() -> Tuple[Callable, Callable]:
    """statx (2), which Python does not know, or what always fails; and what makes room for its answer."""
    try:
        import ctypes
        libc = ctypes.CDLL(None)
        if not hasattr(libc, 'statx'):  # as in musl before 1.2.5
            number = {'x86_64': 332, 'aarch64': 291, 'riscv64': 291}[os.uname().machine]
            return functools.partial(libc.syscall, number), ctypes.create_string_buffer
        return libc.statx, ctypes.create_string_buffer
    except (ImportError, OSError, AttributeError, KeyError):
        return lambda *words: -1, bytes


def is_directory(item: os.DirEntry[str]) -> bool:
    """Not a link to one; what cannot be looked at is none."""
    try:
        return item.is_dir(follow_symlinks=False)
    except OSError:
        return False


class Watch:
    """Listens to directories by inotify. Paths are relative to the root. Where there is no inotify, or not
    enough of it, `fd` is None and `why_not` says why, unless it was not wanted: everything has to be looked
    at now and then. What begins with \\0 is no path in the tree, but where rules of git's stand."""

    def __init__(self, wanted: bool):
        self.why_not = ''
        self.inotify: Any = None
        self.paths: Dict[int, str] = {}         # watch descriptor: directory
        self.descriptors: Dict[str, int] = {}   # the other way round
        if not wanted:
            return
        try:
            import inotify_simple
            self.flags = flags = inotify_simple.flags
            self.mask = (flags.CLOSE_WRITE | flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO
                         | flags.ATTRIB | flags.MODIFY | flags.DELETE_SELF | flags.MOVE_SELF
                         | flags.ONLYDIR | flags.EXCL_UNLINK)
            self.inotify = inotify_simple.INotify()
        except ImportError:
            self.why_not = 'inotify_simple is not installed; pip install inotify_simple, to react at once'
        except AttributeError:          # it was installed on macOS
            self.why_not = 'this system has no inotify'
        except OSError as error:
            self.why_not = ('inotify cannot be used: %s; fs.inotify.max_user_instances may be too small'
                            % error.strerror)

    @property
    def fd(self) -> Optional[int]:
        return self.inotify.fileno() if self.inotify else None

    def follow(self, path: str, full: str) -> str:
        """Watches a directory; called before it is listed, each time. A directory that moved keeps its
        descriptor: returns the path under which its events came until now."""
        if not self.inotify:
            return path
        try:
            # the root may be a link, and where rules stand
            no_follow = self.flags.DONT_FOLLOW if path and path[0] != '\0' else 0
            descriptor = self.inotify.add_watch(full, self.mask | no_follow)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self.give_up('there are more directories than inotify may watch (%d so far); raise '
                             'fs.inotify.max_user_watches, to react at once' % len(self.paths))
            return path                 # gone or unreadable: who lists it will see that
        before = self.paths.get(descriptor, path)
        if path.startswith('\0') and not before.startswith('\0'):
            return path                 # it is watched as a part of the tree
        if before != path and path[:1] not in ('', '\0') and is_behind_link(full[:-len(path)], path):
            return path                 # by now; the link leads to what is watched already
        if before != path and path[:1] not in ('', '\0'):
            root = full[:-len(path)]
            with contextlib.suppress(OSError):
                if os.path.samefile(full, root + before) and not is_behind_link(root, before):
                    self.give_up('%s and %s are one directory, as a bind mount makes it, and inotify '
                                 'tells of changes in one of them' % (shown(before), shown(path)))
                    return path
        if self.descriptors.get(path) != descriptor:
            self.forget(path)           # another stood there
            self.descriptors.pop(self.paths.get(descriptor), None)
            self.paths[descriptor] = path
            self.descriptors[path] = descriptor
        return before

    def forget(self, path: str) -> None:
        """Stops watching a directory that is gone from here, or has become left out."""
        descriptor = self.descriptors.pop(path, None)
        if descriptor is not None:
            del self.paths[descriptor]
            with contextlib.suppress(OSError):      # the kernel may have dropped it with its directory
                self.inotify.rm_watch(descriptor)

    def give_up(self, why: str) -> None:
        self.why_not = why
        self.inotify.close()
        self.inotify = None
        self.paths.clear()
        self.descriptors.clear()

    def read(self) -> Iterator[Tuple[Optional[str], str, int, int]]:
        """Yields (directory, name, mask, cookie) of all events there are; None as the directory when some
        were lost. The two events of a rename have one cookie."""
        for event in self.inotify.read(timeout=0):
            if event.mask & self.flags.Q_OVERFLOW:
                yield None, '', 0, 0
            elif event.mask & self.flags.IGNORED:
                self.descriptors.pop(self.paths.pop(event.wd, None), None)
            elif event.wd in self.paths:
                yield self.paths[event.wd], event.name, event.mask, event.cookie


class Source:
    """What stands here, as it was last looked at, and the hints where to look again."""

    def __init__(self, root: str, left_out: LeftOut, watch: Watch, report: 'Report'):
        self.root, self.left_out, self.watch, self.report = root, left_out, watch, report
        self.tree = Tree()
        # the root's, to know it when it comes back; UNMOUNTED once another may have its numbers
        self.identity: Optional[Tuple[int, int]] = None
        self.gone = False                       # the root
        self.hints: Dict[str, int] = {}         # to be looked at now: META to CONTENT
        self.later: Dict[str, Tuple[float, float, int]] = {}    # path: (when, since when, hint)
        self.changed: Dict[str, int] = {}       # to be compared: what is other than before, or was hinted at
        self.now_ns = 0                         # just before what is being looked at
        self.fresh: Set[str] = set()    # looked at so soon after a change that the next may keep the time
        self.replaced: Set[str] = set() # directories that were found to be others in this look
        self.vanished: Set[str] = set() # what was hinted at, or listed, and was not there
        self.renamed: Dict[int, int] = {}       # cookie: what was hinted of a file on its way to another name
        self.names: Dict[Any, Tuple[str, ...]] = {}     # inode: the paths a file was last seen at
        self.unlisted: Set[str] = set() # directories that could not be listed: what is in them is not known
        self.own_staging = ''           # the name of this session's staging, which must not turn up here
        self.rules_changed = True       # git is to be asked again
        self.git_asked_ns = 0
        self.meanwhile: Callable[[], Any] = self.listen     # called now and then by a long scan

    def full(self, path: str) -> str:
        return self.root + '/' + path if path else self.root

    def made_ns(self, path: str) -> int:
        """When what stands at a path was made, in nanoseconds; 0 if system or file system do not say. What is
        gone is no older than anything."""
        call, room = statx()
        status, full = room(256), self.full(path)
        here, no_follow, made = -100, 0x100, 0x800      # AT_FDCWD, AT_SYMLINK_NOFOLLOW, STATX_BTIME
        if call(here, os.fsencode(full), no_follow, made, status):
            return 0 if os.path.lexists(full) else GONE_NS
        known, seconds, nanoseconds = struct.unpack_from('=I76xqI', status)
        return seconds * 10**9 + nanoseconds if known & made else 0

    def hint(self, path: str, why: int, delay: float = 0, most: float = 0) -> None:
        """Has a path looked at: at once, or in `delay` seconds. Each call starts the delay anew, but not past
        `most` seconds after the first (0: no limit)."""
        if not delay or path in self.hints:
            _, _, before = self.later.pop(path, (0, 0, 0))
            self.hints[path] = max(why, before, self.hints.get(path, 0))
        else:
            now = time.monotonic()
            _, since, before = self.later.get(path, (0, now, 0))
            when = min(now + delay, since + most) if most else now + delay
            self.later[path] = when, since, max(why, before)

    def hinted(self, path: str) -> int:
        """What was hinted of a path since the last look ended; 0 for nothing."""
        return max(self.hints.get(path, 0), self.changed.get(path, 0), self.later.get(path, (0, 0, 0))[2])

    def hint_everything(self) -> None:
        """Has everything looked at, and git asked again what is left out."""
        self.hints[''] = CONTENT
        self.rules_changed = True

    def has_hints(self) -> bool:
        """Whether something is to be looked at now."""
        return bool(self.hints) or self.rules_changed and not self.gone

    def listen(self) -> None:
        """Turns what inotify says into hints."""
        if self.watch.fd is None:
            return
        flags = self.watch.flags
        for directory, name, mask, cookie in self.watch.read():
            if directory is None:
                self.report.warn('inotify lost events: looking at everything again')
                self.hint_everything()
                watched = self.watch.descriptors.get('')
                self.watch.follow('', self.root)        # that it was unmounted may be among what was lost
                if watched not in (None, self.watch.descriptors.get('')):
                    self.identity = UNMOUNTED
                continue
            if directory.startswith('\0'):          # git's own directory, or one above the root
                self.rules_changed = self.rules_changed or name in RULES
                continue
            if not directory and mask & (flags.MOVE_SELF | flags.UNMOUNT):
                self.hint_everything()  # what was seen and said while it was elsewhere counts for nothing
                if mask & flags.UNMOUNT:
                    self.identity = UNMOUNTED
            if name in ('.gitignore', '.git') and self.left_out.ask_git:
                self.rules_changed = True
            path = (directory + '/' + name if directory else name) if name else directory
            is_directory = bool(mask & flags.ISDIR)
            comes = mask & (flags.CREATE | flags.MOVED_TO)
            comes_or_goes = comes or mask & (flags.DELETE | flags.MOVED_FROM)
            begins = (bool(mask & flags.CREATE) and not is_directory and not self.left_out(path, False)
                      and not self.complete_at_birth(path))
            if comes_or_goes:           # what only begins goes once it is closed, and its directory with it
                why = CONTENT if name == '.git' and self.left_out.ask_git else META
                self.hint(directory, why, QUIET_SECONDS * begins, NEW_SECONDS)
            # with it moved the rules that stand in it, or came to where others stood
            if self.left_out.ask_git and is_directory and (
                    mask & flags.MOVED_TO and path in self.tree.inside
                    or mask & flags.MOVED_FROM and self.holds_rules(path)):
                self.rules_changed = True
            if name and self.left_out(path, is_directory):
                if comes_or_goes:
                    self.left_out.ignored.discard(path)
                    self.hint(path, LOOK)
                continue
            if self.report.options.debugging:
                self.report.debug('event', shown(path), str(flags.from_mask(mask)))
            before = self.tree.get(path)
            why, delay, most = META, 0.0, 0.0
            if mask & flags.CLOSE_WRITE or mask & flags.CREATE and not begins or comes and is_directory:
                why = CONTENT
                if directory in self.later:
                    self.hint(directory, META)
            elif comes_or_goes and not mask & flags.CREATE:
                # What went may have left its number to another: where no file system says when that was made,
                # size and time prove nothing.
                went = mask & flags.DELETE or mask & flags.MOVED_TO and before is not None
                why = CONTENT if went and not is_directory and not self.made_ns(directory) else LOOK
            elif mask & (flags.MODIFY | flags.CREATE) or path in self.later and not is_directory:
                why = CONTENT if mask & (flags.MODIFY | flags.CREATE) else META
                delay, most = QUIET_SECONDS, OPEN_SECONDS if before else NEW_SECONDS
            # What was hinted of a file follows it when it is renamed. What comes from elsewhere may have
            # changed there, and kept size and time.
            if not is_directory and mask & flags.MOVED_FROM:
                self.renamed[cookie] = self.hinted(path)
            elif not is_directory and mask & flags.MOVED_TO:
                why = max(why, self.renamed.pop(cookie, CONTENT))
            # of a file with several names an event only tells one: the others are looked at with it
            for each in {path, *self.names.get(before and before.inode, ())}:
                self.hint(each, why, delay, most)

    def holds_rules(self, path: str) -> bool:
        """Whether a .gitignore or a repository is in a directory."""
        return (any(below.endswith('/.gitignore') for below in self.tree.below(path))
                or any((top + '/').startswith(path + '/') for top in self.left_out.git))

    def complete_at_birth(self, path: str) -> bool:
        """Whether what was just created will see no close of a writer: a link, or another name of a file.
        What is written through that, which may be gone before we look, stands at the first name too."""
        try:
            status = os.lstat(self.full(path))
        except OSError:
            return True
        for first in self.names.get((status.st_dev, status.st_ino), ()) if status.st_nlink > 1 else ():
            self.hint(first, LOOK)
        return not stat.S_ISREG(status.st_mode) or status.st_nlink > 1

    def due(self, now: float) -> Optional[float]:
        """Makes hints of what was put off until now. Seconds until the next one; None for none."""
        for path in [path for path, (when, _, _) in self.later.items() if when <= now]:
            self.hint(path, META)
        return min((when - now for when, _, _ in self.later.values()), default=None)

    def ask_git(self) -> None:
        """Has git say anew what is left out. What became so goes from the tree; the replica forgets it too,
        see `take_in`. RACE: a rule that changes between that and the watch on where it stands is noticed by
        its time, here and in `see`."""
        if not os.path.isdir(self.root):
            return
        self.rules_changed = False
        self.git_asked_ns = time.time_ns()
        if self.left_out.refresh():
            below = list(self.tree.below(''))
            for path in [path for path in below if self.left_out(path, self.tree.is_directory(path))]:
                self.lose(path)
            self.hints[''] = CONTENT
        self.follow_rules(self.git_asked_ns, self.left_out.git)

    def follow_rules(self, asked_ns: int, tops: Iterable[str]) -> None:
        """Watches where the rules of these work trees stand. Those that changed since git was asked have it
        asked again."""
        for top in tops:
            for directory, name in itertools.product(self.left_out.git[top].rule_directories(), RULES):
                self.watch.follow('\0' + directory, directory)
                with contextlib.suppress(OSError):
                    changed_ns = os.stat(os.path.join(directory, name)).st_ctime_ns
                    if asked_ns - TICK_NS < changed_ns < time.time_ns() + TICK_NS:
                        self.rules_changed = True

    def look(self) -> Dict[str, int]:
        """Looks at all hints. Returns the paths where something is to be compared, and why; each path that
        went from or came below a directory too. What cannot be read is not gone; what an error kept from
        being looked at is looked at the next time."""
        if not self.root_is_there():
            return {}
        try:
            # What went may have come elsewhere, even while we looked: that has its event by now.
            for _ in range(LOOKS):
                self.look_at_hints()
                if not self.root_is_there():    # then what seemed to be gone may not be
                    return {}
                # Nor if it was elsewhere for a moment: of what it is in no event tells.
                for path in filter(lambda path: os.path.lexists(self.full(path)), self.vanished):
                    self.hint(path, LOOK)
                self.vanished.clear()
                # Nor what git leaves out, where it was asked meanwhile.
                if any(git.went and os.path.isdir(git.top) for git in self.left_out.git.values()):
                    self.hint_everything()
                self.listen()
                if not self.hints:
                    break
        except BaseException:
            self.hint_everything()
            raise
        for path in self.watch.descriptors.keys() & self.changed.keys():
            if not self.tree.is_directory(path):        # only now: one that moved has kept its watch
                self.watch.forget(path)
        self.replaced.clear()
        if CONTENT in self.renamed.values():    # it came where nobody watched yet, as something found there
            self.changed.update((path, CONTENT) for path, why in self.changed.items() if why == LOOK)
        self.renamed.clear()
        changed, self.changed = self.changed, {}
        return changed

    def look_at_hints(self) -> None:
        if self.rules_changed:
            self.ask_git()
        if self.hints.get('') == CONTENT:
            self.hints.update(dict.fromkeys(self.fresh, CONTENT))
            self.fresh.clear()
        hints, self.hints = self.hints, {}
        least = LOOK if hints.get('') == CONTENT else META      # more may have been done than events told
        for path, why in hints.items():
            self.changed[path] = max(why, self.changed.get(path, least))
        if self.left_out.git:
            self.left_out.ask([path for path in hints if path and self.tree.get(path) is None
                               and self.tree.is_directory(parent(path)) and not self.left_out(path, False)])
        self.now_ns = time.time_ns()
        for path in sorted(hints):
            if path and not self.tree.is_directory(parent(path)):
                continue                # what is above it is left out or gone
            if self.see(path, hints[path]):
                self.scan(path)

    def see(self, path: str, why: int = 0, listed: Optional[os.DirEntry[str]] = None) -> bool:
        """Takes note of what stands at a path; with `why` because of a hint, else because its directory is
        being listed, where it was asked already if it is left out. Returns whether it is a directory to be
        listed. An error is said and leaves it as it was last seen. A file looked at within a tick of its last
        change may change again and keep its time: git calls it racily clean. Its size and time prove nothing,
        so when events were lost, or at a new connection, it is sent again. Raises Stop at our own staging."""
        try:                            # the root may be a link
            status = (listed.stat(follow_symlinks=False) if listed else
                      os.stat(self.full(path), follow_symlinks=not path))
            entry = entry_of(status)
            kind = entry.kind
            if kind == 'l':
                entry = entry._replace(mode=0o777, target=os.readlink(self.full(path)))
        except OSError as error:
            if error.errno in GONE:
                self.vanished.add(path)
                self.left_out.ignored.discard(path)
                self.lose(path)
                return False
            if error.errno == errno.EINVAL and not os.path.islink(self.full(path)):
                self.hint(path, LOOK)   # it was a link until just now
                return False
            self.report.problem(path, 'cannot be looked at: ' + error.strerror, 'look')
            self.unlisted.add(parent(path))
            return False
        self.report.solved(path, 'look')
        if not path:                    # however closed it is here, we must not lock ourselves out there
            entry = entry._replace(mode=entry.mode | 0o700)
        before = self.tree.get(path)
        if kind == 'd' and before is not None and before.kind != 'd' and self.left_out.git:
            why = why or LOOK           # git was asked about something else, and may leave out directories
            self.left_out.ask([path])
        if path and (why and self.left_out(path, kind == 'd')
                     or (kind == 's' or '.file_replicator.' in path) and not self.admits(path, kind)):
            self.lose(path)
            return False
        if kind == 'f':
            tick_ns = TICK_NS if entry.mtime_ns % 10**9 else 2 * 10**9          # of a coarse file system
            if abs(self.now_ns - entry.mtime_ns) < tick_ns:
                self.fresh.add(path)
            if path.endswith('.gitignore') and self.left_out.ask_git:
                if not self.left_out.has_git:
                    raise Stop('%s is there, but git, which would read it, is not; install git, or use '
                               '--no-gitignore' % shown(path))
                self.rules_changed = self.rules_changed or entry.ctime_ns > self.git_asked_ns - TICK_NS
        if before != entry:
            least = 0
            if kind == 'f' and before is not None:
                # Only its ctime is another, and no event told why; or it cannot tell, as one in seconds.
                if before.ctime_ns == entry.ctime_ns if why else before[:6] == entry[:6]:
                    least = CONTENT
                # Nor does one tell of what was written through a name elsewhere: a new time is no mere touch.
                elif status.st_nlink > 1 and before.mtime_ns != entry.mtime_ns:
                    least = LOOK
                elif is_below(path, self.replaced):
                    least = OTHER
            elif kind == 'd' and before is not None and is_another(before, entry):
                self.replaced.add(path)
            self.changed[path] = max(least, self.changed.get(path, LOOK))
            if before is not None and before.kind == 'd' and kind != 'd':
                self.lose(path)
            self.put(path, entry)
        if kind != 'd':
            names = self.names.get(entry.inode, ())
            if path not in names:
                names = self.names[entry.inode] = (*(names if status.st_nlink > 1 else ()), path)
            for other in names if before != entry else ():      # also where no event told of it
                if self.changed.get(other, 0) < self.changed[path]:
                    self.hint(other, self.changed[path])
        # What could not be listed may be by now, and the other way round.
        return kind == 'd' and (why in (0, CONTENT) or before is None or before.kind != 'd'
                                or before.inode != entry.inode or path in self.unlisted
                                or not os.access(self.full(path), os.R_OK | os.X_OK))

    def is_newer(self, item: os.DirEntry[str]) -> bool:
        """Whether something may have come since git was asked about everything."""
        try:
            return item.stat(follow_symlinks=False).st_ctime_ns > self.git_asked_ns - TICK_NS
        except OSError:
            return False

    def lose(self, path: str) -> None:
        """Takes note that there is nothing to be replicated at a path. RACE: a root that is gone by now is
        seen at the end of the look; nothing is removed for it."""
        if not path:
            return
        for below in [path, *self.tree.below(path)]:
            later = self.later.pop(below, (0, 0, 0))[2]
            self.changed[below] = max(LOOK, later, self.changed.get(below, 0))
            self.fresh.discard(below)
            self.report.solved(below, 'look')
            self.forget_name(below)
        self.tree.put(path, None)
        # what could not be looked at in what could not be listed is gone too
        for stage, below in list(self.report.problems) if self.unlisted else ():
            if stage in ('look', 'list') and (below + '/').startswith(path + '/'):
                self.report.solved(below, stage)
                self.unlisted.discard(below)

    def put(self, path: str, entry: Entry) -> None:
        """Takes note of what was found at a path."""
        before = self.tree.get(path)
        if before is not None and before.inode != entry.inode:
            self.forget_name(path)
        self.tree.put(path, entry)

    def forget_name(self, path: str) -> None:
        """Takes note that what was last seen at a path does not stand there any more. It is looked at under
        its other names: events still to come may be of what was done through this one."""
        inode = (self.tree.get(path) or UNKNOWN).inode
        others = tuple(name for name in self.names.pop(inode, ()) if name != path)
        if others:
            self.names[inode] = others
        for other in others:
            self.hint(other, LOOK)

    def scan(self, top: str) -> None:
        """Lists a directory and all below it, watching each before it is listed, and takes note of what is
        other than before. RACE: what changes behind us is in the events; what vanishes before us is seen as
        not there."""
        stack = [top]
        tick = 0
        newer: Set[str] = set()         # what may have come since git was asked, and all that is in it
        choosy = self.left_out.ask_git or bool(self.left_out.patterns)
        while stack:
            directory = stack.pop()
            full = self.full(directory)
            prefix = directory + '/' if directory else ''
            self.now_ns = time.time_ns()
            was = self.watch.follow(directory, full)
            try:
                if self.watch.fd is not None:   # what came into it before it was watched changed its time
                    self.see(directory)
                with os.scandir(full) as listed:
                    found = {prefix + item.name: item for item in listed}
            except OSError as error:
                if error.errno in GONE:
                    self.hint(directory, LOOK)
                    continue
                self.report.problem(directory, 'cannot be listed, so nothing in it is replicated or removed: '
                                    + error.strerror, 'list')
                self.unlisted.add(directory)
                continue
            before = self.tree.inside.get(directory)
            if before is None:          # it was replaced
                continue
            self.report.solved(directory, 'list')
            for stage, path in list(self.report.problems) if directory in self.unlisted else ():
                if stage == 'look' and parent(path) == directory and path not in found:
                    self.report.solved(path, stage)     # it is gone, and never was in the tree
            self.unlisted.discard(directory)
            if self.left_out.enter(directory, found):
                self.follow_rules(self.now_ns, [directory])
            if self.left_out.git:       # which was just asked about all there was, if we began at the root
                new = [path for path, item in found.items()
                       if path not in before and (top or directory in newer or self.is_newer(item))]
                newer.update(new)
                self.left_out.ask(new)
            if choosy:
                found = {path: item for path, item in found.items()
                         if not self.left_out(path, is_directory(item))}
            for path in [path for path in before if path not in found]:
                self.lose(path)
            for path in found if was != directory else ():      # then events came under another path
                old = was + path[len(directory):]
                if self.hinted(old) == CONTENT and not os.path.lexists(self.full(old)):
                    self.changed[path] = CONTENT
            for path, item in found.items():
                if self.see(path, listed=item):
                    stack.append(path)
            tick += 1
            if tick % 64 == 0:
                self.meanwhile()        # a long scan must not let the kernel's queues run full

    def admits(self, path: str, kind: str) -> bool:
        """Whether this is something that can be replicated; says if it is not. Raises Stop at our own
        staging."""
        name = path.rpartition('/')[2]
        if self.own_staging and name.startswith(self.own_staging):
            raise Stop('the replica is inside of what it replicates: choose another destination')
        if kind == 's':
            self.report.notice(path, 'is left out: it is no file, directory or link')
        elif is_staging(name):
            self.report.notice(path, 'is left out: it is named as our staging is')
        else:
            return True
        return False

    def root_identity(self) -> Optional[Tuple[int, int]]:
        """The root's device and inode; None if there is no directory."""
        with contextlib.suppress(OSError):
            status = os.stat(self.root)
            if stat.S_ISDIR(status.st_mode):
                return status.st_dev, status.st_ino
        return None

    def root_is_there(self) -> bool:
        """Whether the source can be trusted to be what it was. One that is gone, or empty where another file
        system was, is not a source that was emptied: nothing is removed over there, and it is looked for
        every second."""
        identity, there = self.root_identity(), False
        with contextlib.suppress(OSError):
            there = identity is not None and (self.identity in (None, identity)
                                              or bool(os.listdir(self.root)))
        if not there:
            if identity is not None:
                self.identity = UNMOUNTED
            self.report.problem('', 'is gone, or empty and not what it was: nothing is removed over there, '
                                'and it is replicated again once it is back', 'root')
            self.gone = True
            waiting, self.hints = {**self.hints, '': CONTENT}, {}
            for path, why in waiting.items():
                self.hint(path, why, 1)
            return False
        if self.gone or self.identity not in (None, identity):
            self.hint_everything()
            self.report.solved('', 'root')
        self.gone, self.identity = False, identity
        return True


# ==== 5. Plan ===============================================================================================

def same_time(a: Optional[int], b: Optional[int]) -> bool:
    """Whether two times are one, as far as the far side knows, which has the first."""
    return a is not None and b is not None and (a == b or any(b - b % unit == a for unit in TIME_UNITS))


def apply(tree: Tree, step: Step) -> None:
    """What a step does to the replica. A directory's time changes with each entry that comes or goes."""
    verb, path, entry, detail, _ = step
    if verb == 'meta':
        there = tree.get(path)          # what it does not set stays as it is
        if 'm' not in detail and there.mode != entry.mode:
            entry = entry._replace(mode=there.mode)
        if 't' not in detail and there.mtime_ns != entry.mtime_ns:
            entry = entry._replace(mtime_ns=there.mtime_ns)
        tree.put(path, entry)
        return
    if verb == 'move':
        tree.move(detail, path)
        forget_time(tree, parent(detail))
    elif verb == 'dir':
        stands = tree.get(path) is not None     # a directory perhaps: chmod may leave it its setgid bit
        tree.put(path, entry._replace(mtime_ns=None, mode=-1 if stands else entry.mode))
    else:
        tree.put(path, entry)
    forget_time(tree, parent(path))


def take_back(tree: Tree, step: Step) -> None:
    """The opposite of apply(), for the step that was applied last; but for the times of directories."""
    if step.verb == 'move':
        tree.move(step.path, step.detail)
    tree.put(step.path, step.before)


def recover(tree: Tree, answers: List[Tuple[List[Step], int]]) -> None:
    """Corrects a tree to which all these steps were applied as if each would be done. `answers` begins with
    the first step that failed. Later steps were planned as if it had been done: they may have failed for that
    reason, or met something else at their path. So all are taken back, and those that were done are applied
    again. What may be half done becomes UNKNOWN; what was to be removed is taken to stand, in a state that
    nobody knows."""
    for steps, _ in reversed(answers):
        for step in reversed(steps):
            take_back(tree, step)
    for steps, code in answers:
        for step in steps:
            path, there = step.path, tree.get(step.path)
            if code == 2 or step.verb == 'meta' and there is None:
                if step.verb == 'file':         # what stands may have size and time of what was to be sent
                    forget_time(tree, path)
                continue
            if step.verb == 'meta' and there.kind != step.entry.kind:
                tree.put(path, UNKNOWN)         # it was done to something else
            elif code == 1 and step.verb != 'meta':
                if step.verb != 'remove':
                    tree.put(path, UNKNOWN)
                elif there is not None:         # or not: of several, some may have gone
                    tree.put(path, there._replace(mtime_ns=None, inode=None))
                if step.verb == 'move':         # perhaps to another file system: all is sent, not renamed
                    for each in [step.detail, *tree.below(step.detail)]:
                        tree.put(each, (tree.get(each) or UNKNOWN)._replace(mtime_ns=None, inode=None))
                        tree.put(path + each[len(step.detail):], UNKNOWN)
            else:
                apply(tree, step)
                if code:                        # but for its mode or time, which no entry has
                    mode = -1 if step.entry.kind != 'l' else step.entry.mode
                    tree.put(path, step.entry._replace(mode=mode, mtime_ns=0))


def forget_time(tree: Tree, path: str) -> None:
    there = tree.get(path)
    if there is not None and there.mtime_ns is not None:
        tree.put(path, there._replace(mtime_ns=None))


def is_another(there: Entry, here: Entry, made_ns: Callable[[str], int] = lambda path: 0,
               path: str = '') -> bool:
    """Whether what stands here, at a path, is surely another thing than what was sent from here. The inode
    alone tells nothing: some file systems give the same file a new number, and some give the number of what
    is gone to what is made next. `made_ns` is as for plan()."""
    return (there.inode is not None and here.inode is not None and there.ctime_ns != here.ctime_ns
            and (there.inode != here.inode or made_ns(path) > there.ctime_ns))


def plan(remote: Tree, local: Tree, hints: Dict[str, int], delete: bool = True,
         unlisted: Collection[str] = (), made_ns: Callable[[str], int] = lambda path: 0,
         may_move: Callable[[str, str], bool] = lambda old, new: True) -> List[Step]:
    """The steps that make `remote` equal to `local` at these paths, in the order they must be taken; `remote`
    is changed as they will change it. A hint of CONTENT has a file sent even if size and time are the same,
    OTHER if then its inode is another, META has only mode and time set where only they differ. Without
    `delete`, what is only in `remote` stays, but for what a session left of its own, and moves are copies.
    What is in the `unlisted` directories of `local` is not known, so it stays too.
    `made_ns` says when what stands here was made, 0 if that is not known; `may_move`, whether over there
    something may be renamed; they are asked only where it decides."""
    steps: List[Step] = []
    passed: Set[Tuple[str, int]] = set()        # directories that give their owner these bits by now
    disturbed: Set[str] = set()         # directories whose mode and time have to be compared at the end

    def add(verb: str, path: str, entry: Optional[Entry], detail: str) -> None:
        step = Step(verb, path, entry, detail, remote.get(path))
        steps.append(step)
        apply(remote, step)

    def open_up(path: str, bits: int) -> None:
        """Has a directory, and what is above it, ready for a change in it, of which its owner needs these
        bits. They get their mode and time back at the end."""
        above = []
        while (path, bits) not in passed:
            passed.add((path, bits))
            above.append(path)
            path = parent(path)
        for path in reversed(above):
            there = remote.get(path)
            if there is not None and there.kind == 'd' and there.mode & bits != bits:
                disturbed.add(path)
                add('meta', path, there._replace(mode=there.mode | 0o700, mtime_ns=None), 'm')

    # No two functions here call each other: in such a circle the trees would stay in memory.
    def take(verb: str, path: str, entry: Optional[Entry], detail: str = '') -> None:
        for above in map(parent, (path, detail) if verb == 'move' else (path,)):
            if verb != 'meta':
                disturbed.add(above)
            open_up(above, 0o100 if verb == 'meta' else 0o700)
        add(verb, path, entry, detail)

    def set_meta(path: str, there: Entry, here: Entry) -> None:
        what = 'm' * (there.mode != here.mode) + 't' * (there.mtime_ns != here.mtime_ns)
        if what:
            take('meta', path, here, what)
        else:
            remote.put(path, here)      # the same, and known by the inode it has here

    paths = dict(hints)
    gone: Set[str] = set()
    replaced: Set[str] = set()          # another thing stands there now than did, and so it may be in it
    for path in hints:
        above = parent(path)            # has to be there before it
        while (path and above not in paths and not remote.is_directory(above)
               and local.get(path) is not None):
            paths[above] = LOOK
            above = parent(above)
        there, here = remote.get(path), local.get(path)
        if there is None or here is None and is_below(path, unlisted):
            continue                    # whether it is gone is not known, in the second case
        if here is None or there.kind in 'd?' and here.kind != 'd':
            gone.update(remote.below(path))
            if here is None:
                gone.add(path)
        elif is_another(there, here):
            replaced.add(path)
    movable = {remote.get(path).inode: path for path in gone | replaced} if delete else {}
    movable.pop(None, None)             # what has no inode that we know

    wanted = {local.get(path).inode: path for path in paths
              if movable and path and local.is_directory(path)}         # where directories shall be
    asked: Set[str] = set()

    def next_place(path: str) -> str:
        """Where the directory that is in the way at a path goes itself: it had better go first. '' if it does
        not, or when asked again, as where two change places."""
        there, here = remote.get(path), local.get(path)
        if path in asked or there is None or here is None or there.kind != 'd' or there.inode == here.inode:
            return ''
        asked.add(path)
        to = wanted.get(there.inode, '')
        goes = (movable.get(there.inode) == path and to not in asked and remote.is_directory(parent(to))
                and not to.startswith(path + '/'))
        return to if goes else ''

    work = sorted(paths)                # a heap
    files: List[str] = []
    while work:                         # what is above comes first: directories, and what moved into them
        path = heapq.heappop(work)
        if work[:1] == [path]:
            continue                    # twice
        ahead = next_place(path)
        while ahead:
            heapq.heappush(work, path)
            path, ahead = ahead, next_place(ahead)
        there, here = remote.get(path), local.get(path)
        if here is None:
            continue
        old = movable.get(here.inode)
        was = remote.get(old) if old else None
        # The number of what is gone may by now be that of another thing, which was made after that was last
        # seen, and at its place another stand.
        if (was is not None and was.kind == here.kind and was.inode == here.inode
                and not (path + '/').startswith(old + '/')
                and (there is None or there.kind in 'fl' and here.kind != 'd' and there.inode != here.inode)
                and (here.kind == 'd' or was.size == here.size and was.mtime_ns == here.mtime_ns
                     and was.target == here.target and CONTENT not in (paths.get(old), paths.get(path)))
                and (made_ns(path) <= was.ctime_ns
                     # one that went on meanwhile: all that is in it is compared by itself
                     or here.kind == 'd' and made_ns(path) == GONE_NS)
                and may_move(old, path)):
            if here.kind == 'd' and parent(old) != parent(path):
                open_up(old, 0o700)     # its own .. is written
            for each in [old, *remote.below(old)]:      # nobody may see it come whom it keeps out by then
                goal = local.get(path + each[len(old):])
                was = remote.get(each)
                if goal is not None and was.kind == goal.kind and keeps_out(was, goal):
                    take('meta', each, closed(was, goal), 'm')
            take('move', path, remote.get(old), old)
            passed.clear()              # other directories stand at these paths now
            there = remote.get(path)
            more = {*remote.below(path), *local.below(path)}
            for below in remote.below(path):
                inode = remote.get(below).inode
                if movable.get(inode) == old + below[len(path):]:
                    movable[inode] = below
            for below in more:
                paths[below] = max(paths.get(below, 0), LOOK, paths.get(old + below[len(path):], 0))
                if local.get(below) is None and not is_below(below, unlisted):
                    gone.add(below)
            if local.get(old) is not None:      # what belongs there may have been thought to stand
                again = [old, *local.below(old)]
                paths.update((each, LOOK) for each in again if each not in paths)
                more.update(again)
            for each in more:
                heapq.heappush(work, each)
            if here.kind == 'd':
                replaced.add(path)
        if here.kind != 'd':
            files.append(path)
            continue
        disturbed.add(path)
        if not remote.is_directory(path):
            if there is not None and there.kind != '?':
                take('remove', path, None)
            take('dir', path, here._replace(mode=here.mode & 0o777 | 0o700))
        elif there is not None and keeps_out(there, here):      # whom it keeps out sees nothing come
            take('meta', path, closed(there, here), 'm')
    for path in sorted(gone, reverse=True):
        there = remote.get(path)
        if there is not None and (delete or is_staging(path)):
            take('remove', path, None)
    for path in dict.fromkeys(files):           # some may have come twice
        there, here = remote.get(path), local.get(path)
        if there is not None and there.kind == 'd':
            take('remove', path, None)
            there = None
        if (there is None or there.kind != here.kind or there.target != here.target or there.size != here.size
                or here.kind == 'f' and (paths[path] == CONTENT
                                         or there.mtime_ns != here.mtime_ns
                                         and (paths[path] != META or there.mtime_ns is None)
                                         or is_another(there, here, made_ns, path)
                                         or there.inode != here.inode
                                         and (paths[path] == OTHER or is_below(path, replaced)))):
            take({'f': 'file', 'l': 'link'}[here.kind], path, here)
        else:
            set_meta(path, there, here)
    for path in list(disturbed):        # what is above may have to be opened for it, and is one of them then
        there, here = remote.get(path), local.get(path)
        if there is not None and here is not None and there[:4] != here[:4]:
            open_up(parent(path), 0o100)
    for path in sorted(disturbed, reverse=True):
        there, here = remote.get(path), local.get(path)
        if there is not None and here is not None and there.kind == here.kind == 'd':
            set_meta(path, there, here)
    return steps


def keeps_out(there: Entry, here: Entry) -> bool:
    """Whether something is closed here to somebody for whom it is still open over there."""
    return bool(there.mode & ~here.mode & 0o77)


def closed(there: Entry, here: Entry) -> Entry:
    """What stands over there, closed to those it keeps out here; the rest of its mode comes at the end."""
    mode = there.mode & here.mode | (0o700 if there.kind == 'd' else 0)
    return there._replace(mode=mode, mtime_ns=None)


def differences(local: Tree, remote: Tree) -> Iterator[str]:
    """The paths where the two are not known to be the same."""
    yield from (path for path, here in local.entries.items() if path and remote.get(path) is not here)
    yield from (path for path in remote.entries if path and local.get(path) is None)


def believe(listed: Iterable[Tuple[str, Entry]], local: Tree, known: Tree,
            ours: Callable[[str, Entry], bool], made_ns: Callable[[str], int] = lambda path: 0) -> Tree:
    """The replica as the far side listed it, what is above before what is in it. Only what is ours is taken:
    what stands here, what an earlier connection knew of, and what `ours` says. Where it equals what stands
    here it is the same object, so that a later rename is known by the inode. `made_ns` is as for plan()."""
    remote = Tree()
    for path, entry in listed:
        here, before = local.get(path), known.get(path)
        if here is not None and before is not None and is_another(before, here, made_ns, path):
            here = None
        sent = here or before           # its time may have been rounded down over there
        if sent is not None and entry.mtime_ns != sent.mtime_ns and same_time(entry.mtime_ns, sent.mtime_ns):
            entry = entry._replace(mtime_ns=sent.mtime_ns)
        if here is not None:
            if here[:5] == entry[:5]:
                entry = here
        elif path and before is not None:
            if before.kind == entry.kind and (entry.kind == 'd' or before[2:4] == entry[2:4]):
                entry = entry._replace(inode=before.inode, ctime_ns=before.ctime_ns)
        elif path and (parent(path) not in remote.inside or not ours(path, entry)):
            continue                    # nor is what is in what is not ours
        remote.put(path, entry)
    return remote


# ==== 6. Records: steps as bytes ============================================================================

def wire(path: str) -> bytes:
    """A path as lines of a record, see get in the receiver."""
    return b'./' + os.fsencode(path).replace(b'\n', b'/\n') if path else b'.'


def record(verb: str, number: int, words: Sequence[str], paths: Sequence[bytes], length: int,
           marker: str) -> bytes:
    """Header, paths and length; where that is not 0, the bytes and the marker line follow."""
    head = '%s %d %d %s\n' % (verb, number, len(paths), ' '.join(words))
    return b'%s%s%d %s\n' % (head.encode(), b''.join(path + b'\n' for path in paths), length, marker.encode())


def seconds_of(mtime_ns: int, fine: bool) -> str:
    """A time as touch takes it behind an @."""
    if not fine or mtime_ns % 10**9 == 0:
        return str(mtime_ns // 10**9)
    return '%s%d.%09d' % ('-' * (mtime_ns < 0), *divmod(abs(mtime_ns), 10**9))


def umask_for(mode: int) -> str:
    """With this umask a new file or directory may do no more than `mode`, from its first moment."""
    return '%03o' % (0o777 & ~mode)


Member = Tuple[bytes, Entry, bytes]     # a name in the staging, what it is, its bytes


def tar_header(kind: bytes, name: bytes, size: int, mode: int = 0o644, mtime: int = 0,
               target: bytes = b'') -> bytes:
    fields = b'%07o\0000000000\0000000000\0%011o\0%011o\0' % (mode, size, mtime)
    check = sum(name + fields + kind + target) + 879    # the last field, and blanks for this one
    return TAR_HEADER.pack(name, fields, b'%06o\0 ' % check, kind, target, b'ustar  ')


TAR_HEADER = struct.Struct('100s 48s 8s c 100s 8s 247x')
TAR_KINDS = {'f': b'0', 'd': b'5', 'l': b'2'}
PAX_TIME = b'30 mtime=%010d.%09d\n'     # it begins with its own length
PAX_HEADER = tar_header(b'x', b'pax', 30)


def archive(members: Iterable[Member]) -> bytes:
    """A tar archive that GNU's, busybox's and toybox's tar read alike: ustar headers, GNU's long names, and
    the fraction of a time as a PAX record, which those that do not know it skip. Times are from 1970 on, and
    of at most ten digits in seconds. Python's tarfile takes twenty times as long."""
    out: List[bytes] = []
    for name, entry, data in members:
        target = os.fsencode(entry.target) if entry.target else b''
        for kind, text in ((b'L', name), (b'K', target)):
            if len(text) > 100:
                out += tar_header(kind, b'././@LongLink', len(text) + 1), text, bytes(512 - len(text) % 512)
        seconds, fraction = divmod(entry.mtime_ns or 0, 10**9)
        if fraction:
            out += PAX_HEADER, (PAX_TIME % (seconds, fraction)).ljust(512, b'\0')
        out += (tar_header(TAR_KINDS[entry.kind], name[:100], len(data), entry.mode, seconds, target[:100]),
                data, bytes(-len(data) % 512))
    out.append(bytes(1024))
    return b''.join(out)


def script(members: Iterable[Member], fine: bool, acl: bool) -> bytes:
    """The same for a far side without tar: lines that its shell reads. Names and bytes stand in single
    quotes. `acl` is whether a default ACL rules there."""
    lines: List[bytes] = []
    directories: List[bytes] = []
    groups: Dict[bytes, List[bytes]] = {}       # command: the names it is for

    def many(command: bytes, names: List[bytes]) -> List[bytes]:
        return [b'%s %s || failed=1\n' % (command, b' '.join(names[i:i + LIST_PATHS]))
                for i in range(0, len(names), LIST_PATHS)]

    for name, entry, data in members:
        quoted = b"'%s'" % name.replace(b"'", b"'\\''")
        if entry.kind == 'd':
            directories.append(quoted)
        elif entry.kind == 'l':
            target = os.fsencode(entry.target).replace(b"'", b"'\\''")
            lines.append(b"ln -s -- '%s' %s || failed=1\n" % (target, quoted))
        else:
            for plain, escaped in ((b'\\', b'\\\\'), (b'%', b'%%'), (b"'", b'\\047'), (b'\0', b'\\000')):
                data = data.replace(plain, escaped)
            if data.startswith(b'-'):
                data = b'\\055' + data[1:]
            lines.append(b"printf '%s' >%s || failed=1\n" % (data, quoted))
        # whatever the umask, an ACL or setgid above it made of it
        if entry.kind == 'd' or entry.kind == 'f' and (acl or entry.mode != 0o666 & ~SCRIPT_UMASK):
            groups.setdefault(b'chmod %05o' % entry.mode, []).append(quoted)
        if entry.mtime_ns is not None:
            when = seconds_of(entry.mtime_ns, fine).encode()
            groups.setdefault(b'"$touch" -h -d @' + when, []).append(quoted)
    return b''.join([*many(b'mkdir', directories), *lines,
                     *(line for group in groups.items() for line in many(*group))])


# ==== 7. Connection =========================================================================================

Answered = Callable[[int, str, List[str]], None]        # takes the code, what was said before, and the values


class Sent(NamedTuple):
    """A record on its way."""
    number: int
    size: int                           # bytes
    when: float                         # time.monotonic()
    verb: str
    is_slow: bool                       # over there it may take long
    done: Answered


class FileSlice:
    """Bytes of a file on their way into a pipe, by sendfile: nothing is copied here. What changes in the file
    before they are over there changes in them too, so the file is to be looked at again once they are
    answered. Of a file that shrank, or cannot be read any more (`job.fault` says so), zeros are sent for the
    rest."""

    def __init__(self, file: Any, start: int, length: int, job: 'Job'):
        # the file is closed with its last slice
        self.file, self.start, self.length, self.job = file, start, length, job

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, rest: slice) -> 'FileSlice':
        return FileSlice(self.file, self.start + rest.start, self.length - rest.start, self.job)

    def write_to(self, pipe: int) -> int:
        """Writes some. Returns how many bytes; raises as os.write does."""
        data = b''
        try:
            count = os.sendfile(pipe, self.file.fileno(), self.start, min(self.length, PIPE_BYTES))
            if count:
                return count
        except BlockingIOError:
            raise
        except (OSError, AttributeError):       # not for every file system, nor outside of Linux
            try:
                data = os.pread(self.file.fileno(), min(self.length, BLOCK), self.start)
            except OSError as error:
                self.job.fault = error
        self.job.shrank = self.job.shrank or not data
        return os.write(pipe, data or bytes(min(self.length, BLOCK)))


def program(options: Options, nonce: str, before: str, find_words: Sequence[str]) -> str:
    """What to send: the receiver as it stands, and one call of it."""
    may = 'g' * (options.mirror or options.clean_out) + 'c' * options.checksum + 'd' * options.dry_run
    words = nonce, options.destination, may + '-', options.remote_hook, before, *find_words
    return '%s\nmain "$0" %s\n' % (RECEIVER, ' '.join(map(shlex.quote, words)))


WHAT_IT_MAY_MEAN = {
    127: 'a command was not found: the connection command here, or the shell it asks for over there',
    126: 'a command could not be run: it is not executable, or not there in the container',
    125: 'docker itself refused: is the container running, its name right, the engine reachable?',
    255: 'ssh could not connect or log in',
    0: 'it is no shell, or has nothing on its standard input: docker exec and kubectl exec need -i for that',
}
# what dd and tar say though all is well
CHATTER = re.compile(
    r'\d+\+\d+ records |\d+ bytes .*copied|.*: (time stamp|implausibly old) |.*tar: b/[^:]*$')
START = 'exec sh -c "$R" "$R"'


class Connection:
    """A connection command, started, with the receiver sent to it. Raises Lost where it does not go on."""

    def __init__(self, command: Sequence[str], nonce: str, program: str, report: 'Report'):
        self.report = report
        self.nonce = nonce
        self.staging = '.file_replicator.' + self.nonce
        self.milestone = re.compile(('%s (?:(ready)(\r?)|listed|stop (.*))\n' % self.nonce).encode())
        # not where somebody says the name of the staging
        self.answer = re.compile(r'(?<!_replicator\.)%s (?:(\d+) ([0-3])|\+ (.*)|stop (.*))$' % self.nonce)
        self.out: Deque[Any] = collections.deque()      # memoryviews and FileSlices
        self.flight: Deque[Sent] = collections.deque()
        self.number = self.bytes_in_flight = 0
        # What may be on the way, and how much of a large file goes in one record: see adapt.
        self.window, self.record_bytes = WINDOW_BYTES // 8, BULK_BYTES
        self.answered = 0.0             # when the last answer came
        self.round_trip = 0.0           # seconds, the least that a heartbeat took; 0: not known
        self.is_full = False            # the pipe took no more: that it does again shows that somebody reads
        self.phase = 'starting'         # then listing, then live
        self.heard = bytearray()        # what was not yet understood
        self.said: List[str] = []       # lines of the far side's that are no answers
        self.values: List[str] = []
        self.listing: List[str] = []
        self.complaints = b''           # what the command wrote to its standard error, the end of it
        self.can = ''                   # what the far side can do, once it made its staging
        self.is_staged = False          # over there the staging stands, or will
        self.at_rest = False            # nothing over there is half-way, or staged
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                            stderr=subprocess.PIPE, start_new_session=not has_terminal())
        except OSError as error:
            raise Lost('cannot run %s: %s' % (shown(command[0]), error.strerror))
        files = self.process.stdin, self.process.stdout, self.process.stderr
        self.stdin, self.stdout, self.stderr = (file.fileno() for file in files)
        for fd in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(fd, False)
        for fd in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, 1031, PIPE_BYTES)       # F_SETPIPE_SZ, Linux only
        self.started = self.moved = time.monotonic()
        # One command, complete before anything else is sent: dash and busybox sh read ahead on what they take
        # commands from, and would swallow the first records. sh -c also leaves behind the options and aliases
        # of the outer shell.
        line = 'R=%s; PATH="${PATH:+$PATH:}/usr/bin:/bin"; export PATH; %s\n'
        line = os.fsencode(line % (shlex.quote(program), START))
        # A bash reads its commands from a pipe byte by byte, each with a call of the kernel, but not an
        # interactive one. A head that is missing takes nothing, and so bash reads them as others do.
        first = (b'case ${BASH_VERSINFO-}/$- in /* | *i*) ;; '
                 b'*) builtin eval "$(builtin command head -c %d 2>/dev/null)" ;; esac\n' % len(line))
        self.out += memoryview(first), memoryview(line)
        self.program_bytes = len(line)

    def send(self, verb: str, words: Sequence[str] = (), paths: Sequence[bytes] = (),
             payload: Any = b'', done: Answered = lambda code, said, values: None,
             is_slow: bool = False) -> None:
        self.number += 1
        if verb in ('part', 'base', 'bulk', 'hook', 'rest'):    # see main in the receiver
            self.is_staged = verb != 'rest'
        length = len(payload)
        marker = os.urandom(6).hex()
        head = record(verb, self.number, words, paths, length, marker)
        if self.report.options.debugging:
            self.report.debug('record', shown(os.fsdecode(head)))
        now = time.monotonic()
        if not self.flight:
            self.moved = now
        self.flight.append(Sent(self.number, len(head) + length, now, verb, is_slow, done))
        self.bytes_in_flight += len(head) + length
        pieces = [head, payload, marker.encode() + b'\n'] if length else [head]
        if length < BLOCK and isinstance(payload, bytes):       # one write for a small record
            pieces = [b''.join(pieces)]
        self.out.extend(memoryview(each) if isinstance(each, bytes) else each for each in pieces)

    def slice_bytes(self) -> int:
        """How much of the backlog goes in one record."""
        return min(RECORD_BYTES, self.record_bytes)

    def has_room(self, looked: bool) -> bool:
        """Whether more of the backlog may follow: little enough is on the way, and no more than a record of
        it still here, that a fresh edit need not wait long. Where many records are on their way, only after a
        look (`looked`), so that edits and it take turns."""
        return (self.bytes_in_flight < self.window and sum(map(len, self.out)) < self.slice_bytes()
                and (looked or not self.is_crowded()))

    def adapt(self, waited: float, took: float) -> None:
        """What a large record teaches of the link, from how long it was on the way, and how long after the
        answer before: half a second is the most a fresh edit should wait behind, and however slow the link,
        answers must come often enough that it is not taken for dead."""
        waited -= self.round_trip
        if waited > 0.5:
            self.window = max(BLOCK * 4, self.window * 3 // 4)
        elif waited < 0.2:
            self.window = min(WINDOW_BYTES, self.window * 3 // 2)
        if took > 0.4:
            self.record_bytes = max(LEAST_BYTES, self.record_bytes // 2)
        elif took < 0.1:
            self.record_bytes = min(PART_BYTES, self.record_bytes * 4)

    def is_crowded(self) -> bool:
        """Whether so much waits for answers that changes had better gather here: what changes all the time is
        then sent as often as the far side can follow, and nothing waits long behind it."""
        return len(self.flight) > CROWD or self.bytes_in_flight > self.window * 2

    def write(self) -> None:
        """Writes what the pipe takes at once."""
        while self.out:
            try:
                first = self.out[0]
                count = (os.write(self.stdin, first) if isinstance(first, memoryview)
                         else first.write_to(self.stdin))
            except BlockingIOError:
                self.is_full = True
                break
            except OSError:
                raise Lost(self.diagnosis())
            if self.is_full:
                self.is_full, self.moved = False, time.monotonic()
            if count == len(first):
                self.out.popleft()
            else:
                self.out[0] = first[count:]

    def turn(self, seconds: Optional[float], other: Optional[int] = None) -> None:
        """Waits up to `seconds` (None: until something happens) for the far side or `other` to have
        something, writes what can be written, and calls what the answers that came are for."""
        if Signals.asked:
            raise Stopped
        self.write()                    # most often the pipe takes it all
        poll = select.poll()
        for fd in (self.stdout, self.stderr, other):
            if fd is not None:
                poll.register(fd, select.POLLIN)
        if self.out:
            poll.register(self.stdin, select.POLLOUT)
        limit = self.check_silence()
        wait = min(limit, seconds) if seconds is not None else limit
        for fd, _ in poll.poll(max(0, wait) * 1000 + (0.999 if wait > 0.001 else 0)):
            if fd == self.stderr:
                self.hear_complaints()
            elif fd == self.stdout:
                data = self.process.stdout.read(BLOCK)
                if not data:
                    raise Lost(self.diagnosis())
                if self.phase != 'live' or self.hook_runs():    # else only answers are a sign of life
                    self.moved = time.monotonic()
                self.hear(data)

    def check_silence(self) -> float:
        """Seconds until the next check. Sends a heartbeat when nothing moved for a while. Raises Lost when
        something should have moved and did not; where the far side may be at work all the time, an hour
        later."""
        now = time.monotonic()
        if self.phase == 'starting':
            left = self.started + READY_SECONDS - now
            if left <= 0:
                raise Lost('no shell answered within %d seconds%s' % (READY_SECONDS, self.what_was_said()))
        elif self.flight or self.out or self.phase == 'listing':
            is_slow = (self.hook_runs() or bool(self.flight) and self.flight[0].is_slow
                       or self.phase == 'listing' and self.report.options.checksum)
            seconds = SLOW_SECONDS if is_slow else SILENT_SECONDS
            left = self.moved + seconds - now
            if left <= 0:
                raise Lost('nothing moved for %d seconds' % seconds)
        else:
            left = self.moved + BEAT_SECONDS - now
            if left <= 0:
                self.send('beat')
        return left

    def hook_runs(self) -> bool:
        return bool(self.flight) and self.flight[0].verb == 'hook' and 'begun' in self.values

    def hear_complaints(self) -> None:
        data = self.process.stderr.read(65536)
        if data == b'':
            self.stderr = None          # at its end; the object keeps the file
        self.complaints = (self.complaints + (data or b''))[-BLOCK:]        # a line may come in pieces
        self.report.debug('stderr', *lines_of(data or b''))

    def hear(self, data: bytes) -> None:
        # A milestone may have begun in what came before; none is as long as that.
        since = max(0, len(self.heard) - 200)
        self.heard += data
        while self.phase != 'live':
            found = self.milestone.search(self.heard, since)
            back = b''                  # what is behind our line, where that came back
            if found is None and self.phase == 'starting':
                back = bytes(self.heard.partition(START.encode())[2][:2])
            if back[:1] == b'\n':
                raise Lost('what answers is no shell: it gives back what it is sent')
            if back == b'\r\n' or found and found[2]:
                raise Lost('the connection goes through a terminal, which changes bytes; leave out -t')
            if not found and self.phase == 'starting' and len(self.heard) > SAID_BYTES:
                raise Lost('what answers is no shell: it says too much, and nothing that was asked')
            if not found:
                return
            before, self.heard = self.heard[:found.start()], self.heard[found.end():]
            since = 0
            if found[3] is not None:
                self.hear_last_words(before)
                raise Lost(found[3].decode().strip() + self.what_was_said())
            if found[1]:
                self.phase = 'listing'
                # At least that fast: so no record takes too long, even if ssh packed the program to a fourth.
                rate = self.program_bytes / (time.monotonic() - self.started)
                self.record_bytes = min(self.record_bytes, max(2 * BLOCK, int(rate * SILENT_SECONDS / 12)))
            else:
                self.listing = os.fsdecode(bytes(before)).split(self.nonce + ' ')
                # what the far side says of itself comes first, see main in the receiver
                self.can = next((line[2:] for line in self.listing[:2] if line.startswith('+ ')), '')
                self.phase = 'live'
        lines, _, rest = self.heard.rpartition(b'\n')
        self.heard = rest[-BLOCK:]
        for line in lines.decode(errors='surrogateescape').split('\n') if lines else ():
            self.hear_line(line)

    def hear_last_words(self, data: bytes) -> None:
        """Takes what came before the far side ended, but for what it listed, for why it did."""
        self.said = [line for line in lines_of(data[-BLOCK:]) if not line.startswith(self.nonce)]

    def hear_line(self, line: str) -> None:
        found = self.answer.search(line)
        other = line[:found.start()] if found else line     # before an answer: a line that did not end
        # what nobody asked for may yet be why the connection ends
        del self.said[:-SAID_LINES if self.flight else -2]
        if other and self.flight and self.flight[0].verb == 'hook':
            self.said.append(shown(other))
        elif other and not CHATTER.match(other):
            # The reason is for people: without the shell's name, its line, and the names we gave to temporary
            # files.
            reason = re.sub(r'^[^ ]*: (line )?\d+: ', '', other)
            short = reason.rpartition(self.nonce)[2].partition(': ')[2]
            self.said.append(shown(short if short and short != 'not found' else reason))
        if not found:
            return
        self.moved = time.monotonic()
        number, code, value, why = found.groups()
        if value is not None:
            self.values.append(value)
        elif why is not None:
            raise Lost(why + self.what_was_said())
        elif self.flight and number == str(self.flight[0].number):
            sent = self.flight.popleft()
            self.bytes_in_flight -= sent.size
            waited = self.moved - sent.when
            if sent.verb == 'beat':
                self.round_trip = min(self.round_trip or waited, waited)
            if sent.size >= min(BLOCK, self.record_bytes):
                self.adapt(waited, self.moved - max(sent.when, self.answered))
            self.answered = self.moved
            said, self.said, values, self.values = self.said, [], self.values, []
            self.report.debug('answer', number, code, *said)
            sent.done(int(code), '; '.join(said), values)
        else:
            raise Lost('the far side answers what nobody asked: %s' % shown(line))

    def entries(self) -> Iterator[Tuple[str, Entry, str]]:
        """What the far side listed: path, entry, number of the file system. What cannot be read is sent
        again."""
        end = '.%s\n' % self.nonce
        for line in self.listing:
            try:
                kind, mode, size, when, device, rest = line.rpartition(end)[0].split(' ', 5)
                path, _, target = rest.partition('//')
                if kind[:1] == 'x':     # from stat: one number holds kind and mode
                    bits = int(kind[1:], 16)
                    kind, permissions = KINDS.get(bits & 0o170000, 's'), bits & 0o7777
                else:
                    permissions = int(mode, 8)
                seconds, _, fraction = when.partition('.')
                # before 1970 too: the seconds are rounded down
                mtime_ns = int(seconds) * 10**9 + int(fraction[:9].ljust(9, '0'))
                entry = Entry(kind, permissions if kind != 'l' else 0o777, int(size) if kind == 'f' else 0,
                              mtime_ns, target)
                if not path.endswith(('/', '/.', '/..')):       # nothing outside of the replica is believed
                    yield path[2:], entry, device
            except ValueError:
                continue

    def listed_as(self, name: str) -> str:
        """What the far side listed under a name; '' for nothing."""
        return next((line[len(name) + 1:] for line in self.listing if re.match(name + r'\s', line)), '')

    def mounts(self) -> Set[str]:
        """What is mounted in the replica. In /proc blanks and the like are written in octal."""
        found = re.findall(r'^\S+ (\S+)', self.listed_as('mounts'), re.M)
        here = self.listed_as('at').rpartition('.%s\n' % self.nonce)[0] + '/'
        paths = (re.sub(r'\\([0-7]{3})', lambda m: chr(int(m[1], 8)), path) for path in found)
        return {path[len(here):] for path in paths if path.startswith(here)}

    def sums(self) -> Tuple[str, Dict[str, str]]:
        """The tool the far side's sums are made with ('-' for none), and path: sum."""
        text = self.listed_as('sums') or '-'
        first, *lines = re.split(r'\n(?=\\?[0-9a-f]{32,}  \./|\Z)', text)    # a name may hold a newline
        tool = first.partition('\n')[0]     # somebody else may have said something behind it
        found = {}
        for line in lines:
            value, _, path = line.partition('  ')
            if value.startswith('\\'):          # GNU's way to show a name with one of \n \r \\
                value = value[1:]
                path = re.sub(r'\\(.)', lambda m: {'n': '\n', 'r': '\r'}.get(m[1], m[1]), path)
            found[path[2:]] = value
        return tool, found

    def what_was_said(self) -> str:
        lines = self.said[-3:] + [line[:LINE] for line in lines_of(self.complaints)[-3:]]
        return ': ' + '; '.join(lines) if lines else ''

    def diagnosis(self) -> str:
        """Why the connection ended, as far as can be told. What was answered until then is heard first."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        status = self.process.returncode
        self.hear(self.process.stdout.read(PIPE_BYTES) or b'')
        self.hear_complaints()
        if self.phase != 'live':
            self.hear_last_words(self.heard)
        hint = WHAT_IT_MAY_MEAN.get(status) if self.phase == 'starting' else None
        said = self.what_was_said()
        if status is None:
            return 'the connection command closed its output' + said
        how = 'was killed by signal %d' % -status if status < 0 else 'ended with status %d' % status
        return 'the connection command %s%s%s' % (how, said, ' (%s)' % hint if hint else '')

    def close(self) -> None:
        """Ends the connection, also if a signal comes while it is at that."""
        try:
            self.end()
        except Stopped:
            self.end()
            raise
        finally:
            self.process.stdout.close()
            self.process.stderr.close()

    def end(self) -> None:
        """The end of its input is what tells the receiver to clear up; what is still there after a while gets
        the signal that has it clear up, then the rest is ended."""
        self.process.stdin.close()
        for patience, number in ((0 if self.at_rest else 0.3, signal.SIGTERM), (0.3, signal.SIGKILL)):
            end = time.monotonic() + patience
            # With nothing half-way over there, what the command itself started need not be waited for:
            # whoever inherits it may take his time to see that it ended.
            while ((self.process.poll() is None if self.at_rest else self.signal(0))
                   and time.monotonic() < end):
                self.process.stdout.read(PIPE_BYTES)    # who cannot write cannot end either
                time.sleep(0.0005)
            self.signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):    # sudo's is not ours to end
            self.process.wait(1)

    def signal(self, number: int) -> bool:
        """Sends a signal (0: none) to the connection command; where that has a group of its own, to all it
        started. Returns whether any of them is still there."""
        lives = self.process.poll() is None
        if has_terminal() and not lives:
            return False                # its number may be another's by now
        try:
            os.kill(self.process.pid if has_terminal() else -self.process.pid, number)
            return True
        except OSError:                 # none, or sudo's, which is not ours to end
            return lives


@contextlib.contextmanager
def connecting(*words: Any) -> Iterator[Connection]:
    """A Connection, ended at the end. A signal waits until it is made: nobody else knows what was started."""
    far, Signals.held = None, True
    try:
        far = Connection(*words)
        Signals.held = False
        yield far
    finally:
        Signals.held = False
        if far:
            far.close()


def lines_of(data: bytes) -> List[str]:
    """Somebody else's words for people, without blank lines."""
    return [shown(line) for line in data.decode(errors='replace').splitlines() if line.strip()]


@functools.lru_cache(maxsize=None)
def has_terminal() -> bool:
    """Whether a password could be asked for. Then the connection command stays in our group, or it could not
    ask; else it gets one of its own, so that all it started can be ended."""
    try:
        os.close(os.open('/dev/tty', os.O_RDWR))
        return True
    except OSError:
        return False


# ==== 8. Report: what the user is told, and the hook ========================================================

def say(text: str, file: TextIO) -> None:
    """Raises OSError where it cannot be written; from then on what is written there goes nowhere."""
    try:
        file.write(text)
        file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        raise


def to_stdout(text: str) -> None:
    """Raises Stopped where nobody reads any more, Stop where it cannot be written."""
    try:
        say(text, sys.stdout)
    except BrokenPipeError:
        raise Stopped
    except OSError as error:
        raise Stop('cannot write to standard output: %s' % error.strerror)


def to_stderr(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody to tell
        say(text, sys.stderr)


class Report:
    """What the user is told: each confirmed path on standard output, the rest on standard error, all in the
    log file."""

    def __init__(self, options: Options):
        self.options = options
        self.quiet = options.quiet
        self.log_file = options.log_file
        self.problems: Dict[Tuple[str, str], str] = {}      # (stage, path): why
        self.noticed: Set[Tuple[str, str]] = set()
        self.told: Set[Tuple[str, str]] = set()             # the problems when last it was not in step
        self.lines: List[str] = []
        self.terminal = sys.stderr.isatty()
        self.drawn = 0.0                # when the progress line was; 0: there is none
        self.count_nothing()
        if options.log_file:
            try:
                open(options.log_file, 'a').close()
            except OSError as error:
                raise Stop('cannot write the log file %s: %s' % (shown(options.log_file), error.strerror))

    def name(self, path: str) -> str:
        return shown(path or self.options.source)

    def line(self, text: str, step: Optional[Step] = None) -> None:
        self.lines.append(text)
        if self.files and step is not None and step.verb in ('file', 'link', 'dir'):
            self.files_done += 1
            self.bytes_done += bulk_size(step.entry)

    def flush(self) -> None:
        """Raises Stopped where nobody reads any more."""
        if not self.lines:
            return
        lines, self.lines = self.lines, []
        self.write_log(lines)
        if self.quiet:
            return
        self.erase()
        try:
            to_stdout('\n'.join(lines) + '\n')
        except Stop as why:
            self.quiet = True
            self.warn('%s; going on without' % why)

    def write_log(self, lines: Iterable[str]) -> None:
        if self.log_file:
            try:                        # opened each time, so that it may be moved away
                with open(self.log_file, 'a', encoding='utf-8', errors='backslashreplace') as log:
                    log.writelines('%s %s\n' % (time.strftime('%Y-%m-%d %H:%M:%S'), line) for line in lines)
            except OSError as error:
                self.log_file = ''
                self.warn('the log file %s is given up: %s' % (shown(self.options.log_file), error.strerror))

    def warn(self, text: str) -> None:
        self.flush()
        self.write_log([text])
        self.erase()
        colour = self.terminal and 'NO_COLOR' not in os.environ
        start, end = ('\033[33m', '\033[0m') if colour else ('', '')
        to_stderr('%sfile_replicator: %s%s\n' % (start, text, end))

    def problem(self, path: str, why: str, stage: str) -> None:
        if self.problems.get((stage, path)) != why:
            self.problems[stage, path] = why
            again = '; it is tried again' if self.options.watch and stage == 'send' else ''
            self.warn('%s: %s%s' % (self.name(path), why, again))

    def solved(self, path: str, stage: str) -> None:
        if self.problems:
            self.problems.pop((stage, path), None)

    def notice(self, path: str, why: str) -> None:
        """Says what is no problem, once."""
        if (path, why) not in self.noticed:
            self.noticed.add((path, why))
            self.warn('%s: %s' % (self.name(path), why))

    def debug(self, *words: str) -> None:
        if self.options.debugging:
            to_stderr('debug: %.6f %s\n' % (time.monotonic(), ' '.join(words)))

    def count_nothing(self) -> None:
        self.files = self.bytes = self.files_done = self.bytes_done = 0
        self.since = 0.0

    def expect(self, entries: Collection[Optional[Entry]]) -> None:
        """Counts what is about to be sent, for the progress line: where there is none, `files` stays 0."""
        if self.terminal and not self.quiet:
            self.files += len(entries)
            self.bytes += sum(entry.size for entry in entries if entry is not None)
            self.since = self.since or time.monotonic()

    def moved(self, count: int) -> None:
        if not self.files:
            return
        self.bytes_done += count
        now = time.monotonic()
        if now - self.since > 1 and now - self.drawn > 0.1:
            rate = self.bytes_done / (now - self.since)
            left = max(0, self.bytes - self.bytes_done) / rate if rate else 0
            words = '\r{:,} of {:,} paths, {:.1f} of {:.1f} MB, {:.1f} MB/s, {:.0f} s left\033[K'
            to_stderr(words.format(self.files_done, self.files, min(self.bytes, self.bytes_done) / 1e6,
                                   self.bytes / 1e6, rate / 1e6, left))
            self.drawn = now

    def erase(self) -> None:
        if self.drawn:
            to_stderr('\r\033[K')
            self.drawn = 0.0

    def in_step(self, excused: int) -> None:
        """Says that all is confirmed, but for so many paths that were not to be sent at the start."""
        self.count_nothing()
        if not self.problems:
            self.line('in step' if not excused else
                      'in step, but for %d paths that differed at the start' % excused)
        elif set(self.problems) != self.told:
            self.warn('not in step: %d paths could not be replicated, see above' % len(self.problems))
        self.told = set(self.problems)
        self.flush()


def names_of(paths: Iterable[str]) -> bytes:
    """What a hook reads."""
    return b''.join(os.fsencode(path) + b'\0' for path in paths)


class Hooks:
    """Runs the local hook after what it is about is confirmed, in a thread, so that nothing waits for it."""

    def __init__(self, command: str, report: Report):
        self.command, self.report = command, report
        self.process: Optional[subprocess.Popen] = None
        import queue
        import threading
        self.queue: queue.Queue[Dict[str, None]] = queue.Queue()    # the paths of each time in step
        if command:
            threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        while True:
            paths = self.queue.get()
            while not self.queue.empty():       # what came while it ran is one run
                paths.update(self.queue.get())
                self.queue.task_done()
            try:
                self.run(names_of(paths))
            except OSError as error:
                self.report.warn('the hook cannot be run: %s' % error.strerror)
            except Stopped:             # nobody reads what we say: the main thread sees that by itself
                pass
            self.queue.task_done()

    def run(self, paths: bytes) -> None:
        import tempfile
        with tempfile.TemporaryFile() as out:       # not a pipe: what the hook leaves running may hold it
            self.process = subprocess.Popen(self.command, shell=True, stdin=subprocess.PIPE, stdout=out,
                                            stderr=subprocess.STDOUT, start_new_session=True)
            self.process.communicate(paths)
            out.seek(0)
            for line in lines_of(out.read()):
                self.report.warn('hook: ' + line)
        if self.process.returncode:
            self.report.warn('the hook ended with status %d' % self.process.returncode)

    def stop(self) -> None:
        """Ends a hook that runs, with all it started. What one that ended left running stays."""
        self.queue.queue.clear()
        if self.process and self.process.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGTERM)


# ==== 9. Replica: what the far side holds, and what is on its way there =====================================

class Job:
    """A large file on its way into the far side's staging, in parts."""

    def __init__(self, name: str, step: Step):
        self.name, self.step = name, step
        self.failed = ''                # why, over there
        self.fault: Optional[OSError] = None    # why, here
        self.shrank = False             # so there are zeros in it that never were in the file
        self.unanswered = 0             # parts
        self.is_staged = False          # all of it
        self.parts: Iterator[bool] = iter(())       # each sends a part (True), or waits for an answer (False)


class Abilities(NamedTuple):
    """What do_probe says of the far side, word by word."""
    bulk: str                   # 'tar+'; 'tar', which sets no times of directories; or 'script'
    times: str                  # 'fine', or 'whole' seconds
    sum: str                    # the tool that makes sums, or '-'
    acl: str                    # 'acl' where a default ACL rules, or '-'


NEW = 'dir', 'file', 'link'
VERBS = {'dir': ('make', 'made'), 'file': ('send', 'sent'), 'link': ('link', 'linked'),
         'meta': ('update', 'updated'), 'remove': ('remove', 'removed'), 'move': ('rename', 'renamed')}
# nothing but a file is read, and a FIFO is not waited for
OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_plain(path: str) -> Any:
    return open(path, 'rb', 0, opener=lambda name, _: os.open(name, OPEN_FLAGS))


class Replica:
    """`remote` is what the far side will hold once it has answered all that is on its way. Nothing is said to
    be replicated before it is answered; after a failure `remote` is reckoned anew from the answers; and each
    new connection begins with what the far side lists."""

    def __init__(self, options: Options, source: Source, report: 'Report'):
        self.options, self.source, self.report = options, source, report
        self.far: Any = None                        # the Connection
        self.session = '-'                          # its nonce, for the next one
        self.can: Optional[Abilities] = None        # from the probe on
        self.remote = Tree()
        self.mounts: Set[str] = set()               # directories over there on another file system
        # the backlog: paths still to be compared and sent, and why
        self.waiting: 'collections.OrderedDict[str, int]' = collections.OrderedDict()
        self.jobs: Dict[str, Job] = {}
        self.job_numbers = itertools.count(1)
        self.flying: Dict[int, List[Step]] = {}     # on their way: by the id of the list
        self.answers: List[Tuple[List[Step], int]] = []     # from the first failure on: steps and their code
        # how often a path failed by itself, 0: only among others; from now on it goes by itself
        self.tries: Dict[str, int] = {}
        self.unstable: Dict[str, int] = {}          # how often a file changed while it was read
        self.settled: Dict[str, Entry] = {}         # directories whose mode and time the archive itself sets
        self.excused: Set[str] = set()              # what differed at a start without replication
        self.confirmed: Dict[str, None] = {}        # paths, since the hook last ran
        self.unhooked: Dict[str, None] = {}         # and since the remote hook last began
        self.last_sent: Dict[str, float] = {}       # for --update-interval
        self.since: Optional[Dict[str, int]] = None         # what changed since the first look
        self.unlisted: Set[str] = set()             # directories that could not be listed when last we sent
        self.drifts = 0                             # in a row, without coming into step
        self.begun = self.announced = False         # begun: a first meeting came to its end

    # ---- a new connection

    def meet(self, far: Connection, retry: Retry) -> None:
        """Looks at what stands here while the far side starts; then compares, and sends what differs."""
        options, source = self.options, self.source
        if self.far and self.far.flight:        # perhaps since the link is slow, and it took too long
            far.record_bytes = LEAST_BYTES
        self.far = far
        source.own_staging = far.staging
        if self.begun and source.watch.fd is None:
            source.hint_everything()    # nothing else tells what changed meanwhile
        far.write()                     # that it begins while we look
        changed = source.look()
        self.waiting.update(changed)
        self.since = {} if self.since is None else {**self.since, **changed}
        while far.phase != 'live':
            far.turn(None, source.watch.fd)
            source.listen()
            if source.has_hints():
                self.look_meanwhile()
        retry.connected()
        self.session = far.nonce
        self.look_meanwhile()
        while source.gone:              # what was seen of it may have been half of it
            if not options.watch:
                raise Stop('%s went while it was looked at' % shown(source.root))
            retry.say_connected()
            far.turn(1)
            self.look_meanwhile()
        if far.listed_as('at') and all(path for path, _, _ in far.entries()):
            raise (Lost if self.begun else Stop)(
                'what stands in %s cannot be listed: the far side has neither a find with -printf nor a stat '
                'with -c' % shown(options.destination))
        self.mounts = far.mounts()
        self.judge_extras()
        self.remote = believe(self.listed(), source.tree, self.remote, self.is_ours, source.made_ns)
        if far.can or self.overlaps() and not options.dry_run:
            self.probe()                # before anything is touched
        hints = {path: CONTENT for path, why in self.waiting.items() if why >= OTHER}
        self.excused.difference_update(self.waiting)
        if self.begun or options.initial:
            if options.clean_out and not self.begun:
                self.carry_out(plan(self.remote, Tree(), dict.fromkeys(self.remote.below(''), LOOK)))
                while self.flying:      # a connection that ends before has the next one begin with that again
                    far.turn(None, source.watch.fd)
                    source.listen()
            self.compare(hints)
        else:
            hints = {path: CONTENT if why == OTHER else why for path, why in self.since.items()}
            self.excused.update(set(differences(source.tree, self.remote)) - hints.keys())
        self.remote.put('', self.remote.get('') or source.tree.get(''))
        del far.listing[:]
        self.waiting.clear()
        if len(hints) > 1 and not options.dry_run:      # it has to wait for answers anyway
            far.send('beat')            # for how long is known from one that waits for nothing else
        self.take_in(hints)
        if options.watch:
            self.probe()                # now, rather than before the first edit
        retry.say_connected()
        self.begun = True

    def look_meanwhile(self) -> None:
        """Looks again, for when it can be compared with what stands over there."""
        for path, why in self.source.look().items():
            self.waiting[path] = self.since[path] = max(why, self.waiting.get(path, 0))

    def listed(self) -> Iterator[Tuple[str, Entry]]:
        """What the far side listed; takes note of what is mounted in it."""
        unlisted, mounts = self.source.unlisted, self.mounts
        root_device = None
        for path, entry, device in self.far.entries():
            staging = path.startswith('.file_replicator.') and STAGING.fullmatch(path.partition('/')[0])
            if staging and not staging[1] and (self.options.dry_run or path.startswith(self.far.staging)):
                continue                # the probe would remove it, or made it
            # what could not be read here is not what is not here; of what is mounted only ours is removed
            if self.source.tree.get(path) is None and (
                    is_below(path, unlisted) or self.remote.get(path) is None
                    and (path in mounts or is_below(path, mounts))):
                continue
            if root_device is None:
                root_device = device
            elif device != root_device and entry.kind == 'd':
                mounts.add(path)
            yield path, entry

    def judge_extras(self) -> None:
        """Has git say of what stands only over there, and might be removed, what is left out; what is above
        first, since what is in a directory that is left out need not be asked about."""
        left_out, tree = self.source.left_out, self.source.tree
        if not self.options.mirror or not left_out.git:
            return
        levels: Dict[int, List[str]] = {}
        for path, _, _ in self.far.entries():
            if path and tree.get(path) is None:
                levels.setdefault(path.count('/'), []).append(path)
        for _, paths in sorted(levels.items()):
            left_out.ask([path for path in paths if not left_out.within(parent(path), True)], gone=True)

    def is_ours(self, path: str, entry: Entry) -> bool:
        """Whether something over there that is not here may be removed."""
        if self.options.clean_out and not self.begun:
            return True
        ours = (entry.kind != 'd' and is_staging(path)
                or self.options.mirror and not self.source.left_out.within(path, entry.kind == 'd'))
        if not ours:
            self.source.left_out.known.add(path)
        return ours

    def compare(self, hints: Dict[str, int]) -> None:
        """Adds a hint for each path that differs. RACE: a file changed within the same tick as we looked may
        be other than its time says; it is not believed. A far side that knows only whole seconds cannot tell
        two changes within one, but those of a session are known from here; only across a restart could the
        older bytes stay."""
        local, remote = self.source.tree, self.remote
        watched = self.begun and self.source.watch.fd is not None       # then a second change had its event
        fresh = set() if watched else self.source.fresh
        tool, sums = self.far.sums() if self.options.checksum else ('-', {})
        if self.options.checksum and tool == '-':
            self.report.warn('--checksum: the far side has no sha256sum, sha1sum or md5sum: '
                             'size and time are compared')
        hints.setdefault('', META)
        hints.update((path, CONTENT) for path in fresh if local.get(path) is not None)
        for path in local.below('') if tool != '-' else ():
            here, there = local.get(path), remote.get(path)
            if (there is not None and here.kind == there.kind == 'f' and here.size == there.size
                    and path not in self.excused):
                same = path in sums and sums[path] == self.sum_here(tool, path)
                hints[path] = META if same else CONTENT
        for path in itertools.chain(self.differing(), self.tries):
            hints.setdefault(path, LOOK)

    def differing(self) -> Iterator[str]:
        """The paths where something is to be done, as far as is known."""
        return (path for path in differences(self.source.tree, self.remote) if path not in self.excused)

    def sum_here(self, tool: str, path: str) -> str:
        import hashlib
        digest = hashlib.new(tool[:-3])
        try:
            with open_plain(self.source.full(path)) as file:
                for block in iter(lambda: file.read(1 << 20) or b'', b''):
                    digest.update(block)
        except OSError:
            return ''
        return digest.hexdigest()

    def lost(self) -> None:
        """Notes that what was on its way may or may not have arrived: it is compared anew, and files are sent
        again."""
        on_its_way = [*(steps for steps, _ in self.answers), *self.flying.values()]
        for step in reversed(list(itertools.chain.from_iterable(on_its_way))):
            if step.verb in ('remove', 'move'):         # what was about to go may still be there
                for path in [step.path, *self.remote.below(step.path)]:
                    self.still_there((step.detail or step.path) + path[len(step.path):])
            if step.verb == 'file' or step.verb == 'move' and step.before is not None:
                self.source.hint(step.path, CONTENT)        # what stood there may look the same
        # what is listed has no inode of ours
        for path in [path for path, why in self.waiting.items() if why >= OTHER] + list(self.jobs):
            self.source.hint(path, CONTENT)
        if self.far and 'begun' in self.far.values:     # a hook, which may have ended the connection itself
            self.unhooked.clear()
        self.excused.difference_update(self.waiting)
        for state in (self.waiting, self.jobs, self.flying, self.answers):
            state.clear()
        self.can = None
        self.announced = False

    def probe(self) -> None:
        """Finds out what the far side can do, before the first record that needs to know. Raises Stop where
        it may not write there, and Lost where it may not any more. After that its staging stands, and must
        not stand within the source, nor the source within the replica: Stop too."""
        if self.can:
            return
        answers = [(0, '', [self.far.can])] if self.far.can else []     # it said so with its listing
        if not answers:
            self.far.send('probe', done=lambda *answer: answers.append(answer))
        while not answers:
            self.far.turn(None)
        code, said, values = answers[0]
        if code:
            raise (Lost if self.options.wait or self.options.watch and self.begun else Stop)(
                'cannot write to %s over there: %s' % (shown(self.options.destination), said))
        words = values[0].partition('\n')[0].split() if values else []
        if len(words) != len(Abilities._fields):
            raise Lost('something on the way changes what the far side says')
        self.can = Abilities(*words)
        self.far.is_staged = True
        forget_time(self.remote, '')
        if (os.path.lexists(self.source.full(self.far.staging))
                or self.overlaps() and os.path.lexists(self.options.destination + '/' + self.far.staging)):
            raise Stop('the replica %s and its source %s are the same or one is inside the other: choose '
                       'another destination' % (shown(self.options.destination), shown(self.source.root)))

    def overlaps(self) -> bool:
        """Whether, were the far side this computer, the replica and the source would be in each other."""
        here, there = (os.path.realpath(path) + '/' for path in (self.source.root, self.options.destination))
        return here.startswith(there) or there.startswith(here)

    def rest(self) -> None:
        """Has the far side remove its staging, and sets the root's time, which that changed."""
        self.far.send('rest')
        forget_time(self.remote, '')
        announced = self.announced
        self.send({'': META})
        self.announced = announced      # that is no news

    # ---- sending

    def take_in(self, changed: Dict[str, int]) -> None:
        """Sends what differs at these paths. If it is little, at once; else only what is gone, what moved and
        the first edits go at once. The rest becomes the backlog, which later edits overtake."""
        for directory in self.unlisted - self.source.unlisted:          # what is gone from it is known by now
            gone = (path for path in self.remote.below(directory) if self.source.tree.get(path) is None)
            changed.update((path, LOOK) for path in gone if path not in changed)
        self.unlisted = self.source.unlisted.copy()
        for path in self.excused & changed.keys():      # it was never known to be the same
            changed[path] = max(LOOK, changed[path])
        self.excused.difference_update(changed)
        local, remote = self.source.tree, self.remote
        now = time.monotonic()
        for path in list(changed) if self.options.update_interval else ():
            wait = self.last_sent.get(path, -1e9) + self.options.update_interval - now
            if wait > 0 and local.get(path) is not None and remote.get(path) is not None:
                self.source.hint(path, changed.pop(path), wait)
        for path in changed:            # what became left out stays over there, untouched
            if local.get(path) is None and self.source.left_out.within(path):
                remote.put(path, None)
        for path in changed if self.waiting else ():
            changed[path] = max(changed[path], self.waiting.pop(path, 0))
        pairs = [(path, local.get(path), remote.get(path)) for path in changed]
        size = sum(bulk_size(here) for _, here, _ in pairs)
        self.report.expect([here for _, here, _ in pairs])
        if (len(changed) > BULK_PATHS or size > BULK_BYTES * 4) and not self.options.dry_run:
            # what went, what may have moved, and what is not for everybody any more
            known = [pair for pair in pairs if None not in pair and pair[1].kind == pair[2].kind]
            exchanged = {path for path, here, there in known if here.kind == 'd' and is_another(there, here)}
            first = exchanged.union((path for path, here, there in known if keeps_out(there, here)),
                                    (path for path, here, _ in pairs if here is None))
            movable = {remote.get(below).inode for path in first if remote.get(path) is not None
                       for below in (path, *remote.below(path))} - {None}
            edits = 0
            for path, here, there in pairs:
                if here is not None and there is None and here.inode in movable:
                    first.add(path)
                elif None not in (here, there) and here.kind != 'd' and changed[path] > META:
                    edits += bulk_size(here) + 512
                    if edits < BULK_BYTES:      # an edit need not wait for what is new
                        first.add(path)
            self.waiting.update((path, max(OTHER if is_below(path, exchanged) else META, changed[path]))
                                for path in sorted(changed.keys() - first))
            changed = {path: why for path, why in changed.items() if path in first}
        self.send(changed)

    def fill(self, looked: bool) -> bool:
        """Sends of what can wait as much as there is room for: a part of each large file, and a slice of the
        backlog. Whether there may be more to do at once."""
        busy = False
        for path, job in list(self.jobs.items())[:JOBS]:
            if self.far.has_room(looked):
                state = next(job.parts, None)
                if state is None and self.jobs.get(path) is job:
                    del self.jobs[path]
                busy = busy or state is not False
        # what seems to be gone of a source that is gone may not be
        may = self.far.has_room(looked) and not self.source.gone
        size, some, most = 0, {}, self.far.slice_bytes() if may else 0
        path = ''
        while self.waiting and len(some) < BULK_PATHS and size < most:
            # Where it can, it ends with a directory, whose time else would have to be set once more.
            directory = parent(next(iter(self.waiting)))
            if max(len(some) / BULK_PATHS, size / most) > 0.85 and directory not in (path, parent(path)):
                break
            path, why = self.waiting.popitem(last=False)
            some[path] = why
            # a new time may need a process over there
            size += bulk_size(self.source.tree.get(path)) if why > META else most // LIST_PATHS
        if some:
            following = next(iter(self.waiting), None)
            self.send(some, () if following is None else {'', *ancestors(following)})
        return busy or bool(some)

    def send(self, hints: Dict[str, int], unfinished: Collection[str] = ()) -> None:
        """Sends what differs at these paths. Times and modes of `unfinished` directories, in which more will
        be done, go to the end of the backlog."""
        for path, job in list(self.jobs.items()):
            if self.source.tree.get(path) is None:
                self.cancel(path)
            elif path in hints and not job.is_staged:
                # it is looked at again when the job is done
                self.source.hint(path, hints.pop(path), QUIET_SECONDS)
        steps = plan(self.remote, self.source.tree, hints, not self.options.no_delete, self.source.unlisted,
                     self.source.made_ns, self.may_move)
        if self.tries:
            on_its_way = itertools.chain(steps, *self.flying.values())          # that will be answered
            for path in (self.tries.keys() & hints.keys()) - {step.path for step in on_its_way}:
                del self.tries[path]    # not wanted any more, or as it shall be
                self.report.solved(path, 'send')
        for step in [step for step in steps if step.verb == 'meta' and step.path in unfinished
                     and not is_passing(step)]:
            take_back(self.remote, step)
            self.waiting[step.path] = META
            steps.remove(step)
        self.carry_out(steps)

    def may_move(self, old: str, new: str) -> bool:
        """Whether something over there may be renamed. Not to another file system, where it would be copied
        in place, nor with such in it; nor with what is not ours and would be at its new place. Nor a file to
        what may be the same name there: see do_move."""
        at, to = ([above for above in ancestors(path) if above in self.mounts] for path in (old, new))
        return (at == to and not any((mount + '/').startswith(old + '/') for mount in self.mounts)
                and (self.source.left_out.may_move(old, new) if self.remote.is_directory(old)
                     else old.lower() != new.lower()))

    def carry_out(self, steps: List[Step]) -> None:
        """Sends steps that were planned, which `remote` has taken already. In a dry run it only says them."""
        if not steps:
            return
        if self.options.dry_run:
            for step in filter(is_news, steps):
                self.report.line('would %s' % self.words_for(step, False))
            self.announced = True       # it is not in step, and nobody is to be told that it is
            return
        self.flying[id(steps)] = steps  # if the connection ends before they are sent, they were not taken
        self.announced = False
        self.settled.clear()
        for verb, group in itertools.groupby(steps, lambda step: 'new' if step.verb in NEW else step.verb):
            # It needs no room to remove, and may make some; but at first it is not known what stands there.
            if verb != 'remove' or not self.begun:
                self.probe()
            if verb == 'new':
                self.send_entries(group)
            elif verb == 'meta':
                self.send_metas(list(group))
            elif verb == 'move':
                for step in group:
                    self.post(verb, (), [step], [wire(step.detail), wire(step.path)])
            else:
                self.post_lists(verb, (), group)
        del self.flying[id(steps)]

    def post_lists(self, verb: str, words: Sequence[str], steps: Iterable[Step]) -> None:
        """As many as go in one record; by itself each that failed among others."""
        some: List[Step] = []
        for step in steps:
            if some and (len(some) == LIST_PATHS or step.path in self.tries or some[-1].path in self.tries):
                self.post(verb, words, some)
                some = []
            some.append(step)
        self.post(verb, words, some)

    def post(self, verb: str, words: Sequence[str], steps: List[Step], paths: Sequence[bytes] = (),
             payload: bytes = b'', is_slow: bool = False) -> None:
        """Sends steps as one record; with their paths, if no others are given."""
        when = time.monotonic()
        self.flying[id(steps)] = steps
        if verb == 'move':
            self.settled.clear()        # other directories may stand at those paths now
        elif verb not in ('bulk', 'meta'):
            for step in steps:          # they change a directory's time
                self.settled.pop(parent(step.path), None)
        self.far.send(verb, words, paths or [wire(step.path) for step in steps], payload,
                      lambda code, said, _: self.answered(steps, when, code, said), is_slow)

    def time_of(self, entry: Entry) -> str:
        return seconds_of(entry.mtime_ns or 0, self.can.times == 'fine')

    def send_metas(self, steps: List[Step]) -> None:
        """The modes that directories only have meanwhile go first, one by one: others may be for what is in
        them. Then times, then the other modes, many at once where they are the same, in the order they were
        planned: a directory, that may be opened or closed by it, is behind all that is in it."""
        times: Dict[str, List[Step]] = {}
        modes: List[Step] = []
        for step in steps:
            if 'm' not in step.detail:
                if self.settled.get(step.path) != step.entry:
                    times.setdefault(self.time_of(step.entry), []).append(step)
            elif is_passing(step):
                self.post_lists('meta', self.meta_words(step), [step])
            else:
                modes.append(step)
        for when, group in times.items():
            self.post_lists('meta', ('-', when), group)
        for words, some in itertools.groupby(modes, self.meta_words):
            self.post_lists('meta', words, some)

    def meta_words(self, step: Step) -> Tuple[str, str]:
        return '%05o' % step.entry.mode, self.time_of(step.entry) if 't' in step.detail else '-'

    def send_entries(self, steps: Iterable[Step]) -> None:
        """New directories, files and links: together, or where they failed before, or cannot, one by one."""
        batch: List[Tuple[Step, bytes]] = []
        large: List[Tuple[Step, bytes]] = []    # that are faster by themselves; behind their directories
        size, most = 0, self.far.slice_bytes() * 2
        for count, step in enumerate(steps):
            if count % 64 == 0:
                self.far.write()        # the far side need not be idle meanwhile
            data, name = b'', '-'
            if step.verb == 'file':
                job = self.jobs.get(step.path)
                if job and job.is_staged and job.step.entry == step.entry:
                    name = self.jobs.pop(step.path).name
                else:
                    self.cancel(step.path)
                    if step.entry.size > min(BULK_BYTES, most):
                        self.start_job(step)
                        continue
                    read = self.read(step)
                    if read is None:
                        take_back(self.remote, step)
                        continue
                    step, data = read
            if self.can.bulk == 'script' and len(data) > SCRIPT_BYTES:
                large.append((step, data))
                continue
            unknown = step.before is not None and step.before.kind == '?'
            alone = (name != '-' or unknown or step.path in self.tries
                     or self.mounts and is_below(step.path, self.mounts)     # no rename leads there
                     # it may stand there: no rename replaces a directory in which something is
                     or step.verb == 'dir' and is_below(step.path + '/', self.source.left_out.known)
                     or not 0 <= (step.entry.mtime_ns or 0) < 8 * 10**18)       # the times that tar knows
            if alone or size + len(data) > most or len(batch) >= BULK_PATHS:
                self.send_batch(batch)
                batch, size = [], 0
            if alone:
                self.send_one(step, data, name)
            else:
                batch.append((step, data))
                size += len(data) + 2048        # what an archive needs for the rest of it
        self.send_batch(batch)
        for step, data in large:
            self.send_one(step, data)

    def send_one(self, step: Step, data: bytes, name: str = '-') -> None:
        """One by itself; of a file its bytes, or the name under which it is staged."""
        entry = step.entry
        if step.verb == 'file':         # the umask alone gives a new file most modes, where it means anything
            plain = name == '-' and not entry.mode & ~0o666 and self.can.acl != 'acl'
            mode = '-' if plain else '%05o' % entry.mode
            words = umask_for(entry.mode), mode, self.time_of(entry), name
            self.post('file', words, [step], (), data,
                      name != '-' and is_below(step.path, self.mounts))         # then it is copied there
        elif step.verb == 'dir':
            self.post('dir', ('%03o' % (entry.mode & 0o777),), [step])
        else:
            target = os.fsencode(entry.target).replace(b'\n', b'/\n') + b'.'
            self.post('link', (self.time_of(entry),), [step], [target, wire(step.path)])

    def send_batch(self, batch: List[Tuple[Step, bytes]]) -> None:
        """Each entry goes to the staging below the number of the directory it belongs in, the nearest that
        stands over there already; so a new directory is moved to its place with all that is in it. A few are
        faster one by one."""
        if len(batch) < 3:
            for step, data in batch:
                self.send_one(step, data)
            return
        bases: List[str] = []           # directories that stand there: what is in b/N belongs in the Nth
        staged: Dict[str, bytes] = {}           # directory: its name in the staging
        top = Entry('d', 0o700)
        members: List[Member] = [(b'b', top, b'')]
        # Each directory with all that is in it at a stretch: else GNU's tar sets its time before its last
        # file is there.
        for step, data in sorted(batch, key=lambda pair: pair[0].path.replace('/', '\0')):
            above, _, name = step.path.rpartition('/')
            if above not in staged:
                self.settled.pop(above, None)
                bases.append(above)
                staged[above] = b'b/%d' % len(bases)
                members.append((staged[above], top, b''))
            name_there = staged[above] + b'/' + os.fsencode(name)
            if step.verb == 'dir':
                staged[step.path] = name_there
                here = self.source.tree.get(step.path)
                if here is not None and here.mode == step.entry.mode and self.can.bulk != 'tar':
                    self.settled[step.path] = here
            members.append((name_there, step.entry, data))
        if self.can.bulk == 'script':
            kind, payload = 'script', script(members, self.can.times == 'fine', self.can.acl == 'acl')
        else:
            kind, payload = 'tar', archive(members)
        self.post('bulk', (kind,), [step for step, _ in batch], [wire(path) for path in bases], payload)
        if self.can.bulk == 'tar':      # busybox's: no times but of files, and setuid and setgid only if root
            self.send_metas([step._replace(verb='meta', detail='t' if step.verb == 'link' else 'm',
                                           before=step.entry)
                             for step, _ in batch if step.verb == 'link' or step.entry.mode & 0o6000])

    def read(self, step: Step) -> Optional[Tuple[Step, bytes]]:
        """The bytes of a small file, as they were at one moment, and the step with the size and time of that
        moment. None if there is nothing to send now; then it was said or hinted."""
        path, entry, fd = step.path, step.entry, -1
        try:
            fd = os.open(self.source.full(path), OPEN_FLAGS)
            seen = entry
            for attempt in range(4):
                data = os.pread(fd, seen.size + 1, 0)
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode) or status.st_size > BULK_BYTES:
                    self.source.hint(path, CONTENT)
                    return None
                # another file may have been renamed to this path since we looked
                stands_still = ((seen.size, seen.mtime_ns, seen.inode)
                                == (status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino)))
                if stands_still and len(data) == seen.size:
                    break
                seen = entry_of(status)
            else:       # it never stands still: this is as good as any, and it will be sent again
                if stands_still:
                    raise OSError(errno.EIO, 'it does not hold as many bytes as it says')
                data = data[:seen.size]
                self.send_again(path)
            if attempt:
                entry = seen._replace(size=len(data))
                self.source.put(path, entry)
                self.remote.put(path, entry)
                step = step._replace(entry=entry)
            return step, data
        except OSError as error:
            self.unreadable(path, error)
            return None
        finally:
            if fd >= 0:
                os.close(fd)

    def send_again(self, path: str) -> bool:
        """Has a file that changed while it was read sent again; where nobody watches, not for ever. Whether
        it will be."""
        tries = self.unstable[path] = self.unstable.get(path, 0) + 1
        if not self.options.watch and tries >= UNSTABLE_MOST:
            return False
        self.source.hint(path, CONTENT, QUIET_SECONDS, OPEN_SECONDS)
        return True

    def unreadable(self, path: str, error: OSError) -> None:
        """RACE: what vanished or became something else after we looked has its own event; it is looked at
        once more, and its bytes were not sent, wherever it is by then."""
        if error.errno in (*GONE, errno.EISDIR, errno.ESPIPE, errno.ENXIO):
            self.source.hint(path, CONTENT, 0 if error.errno != errno.ENXIO else 1)
        else:
            self.failed(path, 'cannot be read: %s' % error.strerror)

    # ---- large files

    def start_job(self, step: Step) -> None:
        job = self.jobs[step.path] = Job('part%d' % next(self.job_numbers), step)
        job.parts = self.upload(job)
        take_back(self.remote, step)
        there = step.before             # it stands until then, and may be where nobody was let in
        if there is not None and there.kind == 'f':
            # But no rename of it must count for one of this: its size and time may be the same.
            forget_time(self.remote, step.path)
            if keeps_out(there, step.entry):
                closing = Step('meta', step.path, closed(there, step.entry), 'm',
                               self.remote.get(step.path))
                apply(self.remote, closing)
                self.post('meta', self.meta_words(closing), [closing])

    def cancel(self, path: str) -> None:
        job = self.jobs.pop(path, None)
        if job:
            job.parts.close()
            self.discard(job)

    def discard(self, job: Job) -> None:
        """Has the far side remove what it has of a large file."""
        self.far.send('remove', (), [wire(self.far.staging + '/' + job.name)])

    def upload(self, job: Job) -> Iterator[bool]:
        """Sends a file into the staging. Once it is all there, and if it is still the same here, it takes its
        place, as a step that is planned like any other. Of a file that stands there already in another state
        only the blocks that differ are sent."""
        path = job.step.path

        def part(where: str, start: int, length: int) -> None:
            job.unanswered += 1
            self.far.send('part', (where, job.name), (), FileSlice(file, start, length, job), answered)

        def answered(code: int, said: str, _: List[str]) -> None:
            job.unanswered -= 1
            if code and not job.failed:
                job.failed = said or 'it could not be written there'

        try:                            # a directory too fails
            file = open_plain(self.source.full(path))
        except OSError as error:
            self.unreadable(path, error)
            return
        fd = file.fileno()
        opened = entry_of(os.fstat(fd))         # of another file, if one was renamed to this path meanwhile
        entry = job.step.entry._replace(inode=opened.inode, ctime_ns=opened.ctime_ns)
        job.step = job.step._replace(entry=entry)
        at = 0
        for at in self.patch(job, fd, part):
            yield at > 0
        while at < entry.size and not job.failed:
            length = min(entry.size - at, self.far.record_bytes)
            part('-' if at else '=', at, length)
            at += length
            self.report.moved(length)
            yield True
        while job.unanswered:
            yield False
        after = os.fstat(fd)
        file.close()
        still = (after.st_size, after.st_mtime_ns) == (entry.size, entry.mtime_ns)
        if still:
            self.unstable.pop(path, None)
        if job.fault:
            self.unreadable(path, job.fault)
        elif job.failed:
            self.failed(path, job.failed)
        elif still or self.unstable.get(path, 0) > 1 and after.st_size >= entry.size and not job.shrank:
            here = self.source.tree.get(path)
            if here is not None and here.kind == 'f':   # by now it may keep out who could read it
                entry = entry._replace(mode=entry.mode & here.mode)
                job.step = job.step._replace(entry=entry)
            if not still:       # it never stands still: this is as good as any, and it will be sent again
                self.send_again(path)
            elif here != entry:         # another, or with another mode, that waits for its turn
                self.source.hint(path, META, QUIET_SECONDS)
            job.is_staged = True
            if here is not None and here.kind == 'f':
                self.source.put(path, entry)
                self.send({path: CONTENT})
                return
        elif not self.send_again(path):
            self.failed(path, 'cannot be read: it was shorter at the end each time')
        self.discard(job)

    def patch(self, job: Job, fd: int, part: Callable[[str, int, int], None]) -> Iterator[int]:
        """Has the far side stage what stands there, and sends the blocks that differ. Yields how far it came;
        0 while it waits, and at last if there is nothing to begin with: then the file is sent whole."""
        common = min(job.step.entry.size, job.step.before.size if job.step.before is not None else 0)
        if common <= BULK_BYTES or self.can.sum == '-':
            return
        import hashlib
        # Each costs some milliseconds over there, so they are the larger the faster the link is.
        block = BLOCK * max(-(-common // (BLOCK * 256)), self.far.slice_bytes() // (BLOCK * 16))
        block = min(SUMS_BYTES, block)
        some = SUMS_BYTES // block * block
        asked, at, end = 0, 0, common // block * block
        path = [wire(job.step.path)]
        answers: Deque[Tuple[int, str, List[str]]] = collections.deque()
        while at < end:
            while asked < min(at + 2 * some, end):      # the sums of the next ones are made meanwhile
                count = min(some, end - asked) // block
                words = job.name, str(count), str(block), str(asked // BLOCK)
                self.far.send('base', words, path, done=lambda *answer: answers.append(answer))
                asked += count * block
            while not answers:
                yield 0
            code, _, values = answers.popleft()
            sums = [value.split()[0] for value in values if value.strip()]
            if code or len(sums) != min(some, end - at) // block:
                self.discard(job)
                job.name = 'part%d' % next(self.job_numbers)    # nothing is added to what stays
                yield 0
                return
            for there in sums:
                try:
                    data = os.pread(fd, block, at)
                except OSError as error:
                    job.fault = error
                    return
                if hashlib.new(self.can.sum[:-3], data).hexdigest() != there:
                    most = max(BLOCK, self.far.record_bytes // BLOCK * BLOCK)
                    for start in range(at, at + block, most):
                        part(str(start // BLOCK), start, min(most, at + block - start))
                at += block
                yield at

    # ---- answers

    def answered(self, steps: List[Step], when: float, code: int, said: str) -> None:
        """Confirms steps, or says why they failed. Raises Drifted where the far side is not as it was listed,
        unless that comes from a step of ours that failed while this was on its way."""
        if code in (0, 3):
            took_ms = (time.monotonic() - when) * 1000
            for step in steps:
                self.confirm(step, took_ms)
            self.report.flush()
            if code == 0 and said:
                self.report.warn('%s: the far side says: %s' % (shown(steps[0].path), said))
        if code:
            code = self.failed_there(steps, code, said)
        del self.flying[id(steps)]      # only now: see lost() for what is not known to be done
        if code or self.answers:
            self.answers.append((steps, code))
        if self.answers and not self.flying:        # all is answered: what differs by now is sent
            answers, self.answers = self.answers, []
            recover(self.remote, answers)
            self.look_again(['', *self.differing()])

    def failed_there(self, steps: List[Step], code: int, said: str) -> int:
        """Says why steps failed, and when they are to be tried again. Returns the code, or 0 for what is as
        good as done."""
        only, follows = steps[0], bool(self.answers)
        stood = only.before.kind if len(steps) == 1 and only.before is not None else ''
        reason = said.rpartition(': ')[2].lower()       # the path before it may have any name
        in_the_way = (only.verb == 'remove' and stood in ('d', '?')
                      and ('not empty' in reason or 'busy' in reason))
        if 'not empty' in reason and (stood in ('f', 'l') or len(steps) == 1 and self.holds_unlisted(only)):
            code = 2                    # a directory stands where none did
            self.tries[only.path] = int(not follows)
        if code == 2 and follows:       # for want of another that failed: it is planned anew
            self.try_again(steps)
            return code
        if code == 2 and self.drifts < DRIFTS_MOST:
            self.drifts += 1
            raise Drifted('%s: %s' % (shown(only.path), said or 'it is not there any more'))
        if code == 1 and in_the_way and not follows and not self.remote.inside.get(only.path):
            if self.source.tree.get(only.path) is None:     # else what is to stand there says so
                self.report.notice(only.path, 'stays over there: it holds what was not replicated')
                self.report.solved(only.path, 'send')
                self.tries.pop(only.path, None)
            return 0
        if code == 3 or code == 1 and only.verb == 'meta' and len(steps) == 1:
            if only.verb == 'meta' and only.detail == 't' and only.entry.kind == 'd':
                # Only its owner may set it, so one more try is enough, until something changes in it.
                self.report.notice(only.path, 'its time could not be set: ' + said)
                if ('send', only.path) not in self.report.problems and self.tries.pop(only.path, 0):
                    return 0
                said = ''
            said = said.partition('; ')[0]      # whether one or both were refused, it is the same problem
            self.failed(only.path, said and 'its mode or time could not be set: ' + said, META)
        elif len(steps) > 1 or only.verb == 'move':
            for step in steps:
                self.tries.setdefault(step.path, 0)
            self.try_again(steps)
        else:
            self.failed(only.path, said or 'it could not be done over there')
        return code

    def holds_unlisted(self, step: Step) -> bool:
        """Whether what is in the way of a step, in a directory that was never listed, may be for --mirror to
        remove once it is. That is tried once: what find need not list stays."""
        return (self.options.mirror and step.entry is not None and not self.tries.get(step.path)
                and not any(path.startswith(step.path + '/') for path in self.source.left_out.known))

    def try_again(self, steps: List[Step]) -> None:
        """Puts off once more those of them that had failed by themselves: see is_blocked."""
        for step in steps:
            if self.tries.get(step.path):
                self.failed(step.path, '')

    def look_again(self, paths: Iterable[str]) -> None:
        """Has these compared, but for what waits for its turn or its next try."""
        for path in paths:
            if not (path in self.waiting or path in self.jobs or path in self.source.later
                    or self.is_blocked(path)):
                self.source.hint(path, LOOK)

    def is_blocked(self, path: str) -> bool:
        """Whether a path, or a directory above it that is not there, failed and waits for its next try."""
        return bool(self.tries.get(path)) or any(
            self.tries.get(above) and not self.remote.is_directory(above) for above in ancestors(path))

    def still_there(self, path: str) -> None:
        """Notes that a path may still stand over there, and so the directories above it do. What came there
        since may look the same, so that is sent."""
        for directory in ancestors(path):
            if not self.remote.is_directory(directory):
                self.remote.put(directory, Entry('d', 0o700))
        if self.remote.get(path) is None:
            self.remote.put(path, UNKNOWN)
        self.source.hint(path, CONTENT)

    def failed(self, path: str, why: str, hint: int = CONTENT) -> None:
        """Says once why a path could not be replicated ('': that was said already), and has it tried again if
        we watch."""
        if why:
            self.report.problem(path, why, 'send')
        tries = self.tries[path] = self.tries.get(path, 0) + 1
        if self.options.watch:
            delay = min(RETRY_MOST_SECONDS, RETRY_SECONDS * 2 ** min(tries - 1, 9))
            # a directory without all that is in it
            self.source.hint(path, LOOK if self.source.tree.is_directory(path) else hint, delay)

    def confirm(self, step: Step, took_ms: float) -> None:
        path = step.path
        self.report.solved(path, 'send')
        self.excused.discard(path)
        if self.tries.pop(path, 0):
            if path in self.source.later:
                self.source.hint(path, META)    # it need not wait for its next try
            # nor what is in it
            self.look_again([*self.source.tree.below(path), *self.remote.below(path)])
        if not is_news(step):
            return
        self.confirmed[path] = self.unhooked[path] = None
        if step.verb == 'file' and self.options.update_interval:
            self.last_sent[path] = time.monotonic()
        size = '{:,} bytes, '.format(step.entry.size) if step.verb == 'file' else ''
        self.report.line('%s (%s%.0f ms)' % (self.words_for(step), size, took_ms), step)

    def words_for(self, step: Step, past: bool = True) -> str:
        verb = VERBS[step.verb][past]
        if step.verb == 'move':
            return '%s %s -> %s' % (verb, shown(step.detail), shown(step.path))
        is_directory = step.verb != 'meta' and (step.entry or step.before).kind in 'd?'
        return '%s %s%s' % (verb, shown(step.path), '/' * is_directory)

    def run_hooks(self, hooks: Hooks) -> None:
        """Runs the hooks if something was confirmed since they last ran, with the paths that were."""
        if self.confirmed and self.options.hook:
            hooks.queue.put(self.confirmed.copy())
        self.confirmed.clear()
        if self.unhooked and self.options.remote_hook:
            self.far.send('hook', (), (), names_of(self.unhooked), self.remote_hook_ended)
        else:
            self.unhooked.clear()

    def remote_hook_ended(self, code: int, said: str, values: List[str]) -> None:
        if not code or 'begun' in values:       # else it is told of them the next time
            self.unhooked.clear()
        if said:
            self.report.warn('remote hook: %s' % said)

    def is_idle(self, sent_is_enough: bool = False) -> bool:
        """Whether nothing is waiting, but what failed and is tried again later; nor on its way, unless sent
        is enough."""
        on_its_way = self.far.flight or self.far.out
        return not (self.source.hints or self.jobs or self.answers or on_its_way and not sent_is_enough
                    or not self.source.gone
                    and (self.waiting or any(not self.tries.get(path) for path in self.source.later)))


# ==== 10. The program =======================================================================================

def replicate(options: Options) -> int:
    """The whole program: looks at the source while the far side starts, compares, sends what differs, and
    goes on as long as it is watched; when a connection ends, it makes another and begins again. Returns the
    exit status; raises Stop where it cannot go on."""
    report = Report(options)
    left_out = LeftOut(options.source, options.excludes, options.gitignore)
    outputs = [options.log_file] * bool(options.log_file) + ['/proc/self/fd/1', '/proc/self/fd/2']
    for output in sorted(set(map(os.path.realpath, outputs))):
        path = os.path.relpath(output, os.path.realpath(options.source))
        if os.path.isfile(output) and not path.startswith('../'):
            left_out.patterns.append(('/' + path, re.compile(re.escape(path)), False))
            report.notice(path, 'is left out: it is our own output')
    watch = Watch(options.watch and not options.poll)
    source = Source(options.source, left_out, watch, report)
    replica = Replica(options, source, report)
    hooks = Hooks(options.hook, report)
    retry = Retry(options, report)
    source.hint('', CONTENT)
    try:
        while True:
            try:
                source.ask_git()
                everything = options.clean_out and not replica.begun
                nonce = os.urandom(6).hex()
                text = program(options, nonce, replica.session, [] if everything else left_out.find_words())
                with connecting(options.command, nonce, text, report) as far:
                    source.meanwhile = lambda: (far.turn(0), source.listen())
                    replica.meet(far, retry)
                    keep_in_step(options, source, replica, hooks, report)
                    return 1 if report.problems else 0
            except Lost as why:
                replica.lost()
                retry.wait(why, source, len(replica.confirmed))
    except Stop as why:
        report.write_log(['file_replicator: %s' % why])
        raise
    finally:
        hooks.stop()
        left_out.close()
        report.flush()


def keep_in_step(options: Options, source: Source, replica: Replica, hooks: Hooks, report: Report) -> None:
    """Sends what is hinted at before the backlog, and says when everything is confirmed. Returns when that is
    all."""
    poll_seconds = options.poll or POLL_SECONDS
    next_look = time.monotonic() + poll_seconds
    while True:
        polled = options.watch and source.watch.fd is None
        if polled and source.watch.why_not:
            report.notice('', 'is looked at every %g seconds: %s' % (poll_seconds, source.watch.why_not))
        if polled and time.monotonic() >= next_look:
            source.hint_everything()
            next_look = time.monotonic() + poll_seconds
        # inotify tells that the root went only once nobody works in it any more
        if not source.gone and source.root_identity() != source.identity:
            source.hint_everything()
        busy = looked = False
        if not replica.answers:         # else it has to be known first what became of what was sent
            if source.has_hints() and not replica.far.is_crowded():
                replica.take_in(source.look())
                looked = True
            busy = replica.fill(looked)
        if not busy and replica.far.is_staged and replica.is_idle(sent_is_enough=not options.watch):
            replica.rest()
        elif not busy and replica.is_idle():
            if not replica.announced:
                replica.announced = True
                replica.drifts = 0
                report.in_step(len(replica.excused))
                replica.run_hooks(hooks)
            if not options.watch and replica.is_idle():
                hooks.queue.join()
                replica.far.at_rest = True
                return
        now = time.monotonic()
        wait = source.due(now)          # only now: the above may have put off something
        if polled:
            wait = min(next_look - now, wait if wait is not None else 1e9)
        more = source.has_hints() and not replica.answers and not replica.far.is_crowded()
        replica.far.turn(0 if busy or more else wait, source.watch.fd)
        report.moved(0)
        source.listen()


class Retry:
    """When to connect again, and what the user sees of it: one line when the connection is lost, one when it
    is back."""

    def __init__(self, options: Options, report: Report):
        self.options, self.report = options, report
        self.since = 0.0                # when it last connected; 0: never
        self.lost_at = 0.0              # when it was said that it lost that connection
        self.reasons: Set[str] = set()  # that were said since, without numbers; none while it is connected
        self.good_news = ''             # what is said once it is
        self.delay = 0.0
        self.confirmed, self.stuck_since = -1, 0.0      # how much was replicated, since which loss
        self.taken: List[float] = []    # when our staging was taken away

    def connected(self) -> None:
        self.since = time.monotonic()

    def say_connected(self) -> None:
        """Not at once: a connection that can write nothing, as to a full disk, ends before."""
        if self.reasons:
            self.report.warn(self.good_news)
            self.reasons.clear()

    def wait(self, why: Lost, source: Source, confirmed: int) -> None:
        """Waits before the next attempt, collecting events. `confirmed` is how much was replicated yet.
        Raises Stop when there is none: where nobody watches, once no more was for long."""
        if not self.since and not self.options.wait:
            raise Stop('cannot replicate to %s: %s; try the connection command by hand, or --wait for it'
                       % (shown(self.options.destination), why))
        now = time.monotonic()
        if confirmed != self.confirmed:
            self.confirmed, self.stuck_since = confirmed, now
        if self.since and not self.options.watch and now - self.stuck_since > GIVE_UP_SECONDS:
            raise Stop('cannot replicate to %s: for %d seconds each connection ended before anything more '
                       'was replicated: %s' % (shown(self.options.destination), GIVE_UP_SECONDS, why))
        if 'staging was taken' in str(why):
            self.taken = [when for when in self.taken if now - when < 60] + [now]
            if len(self.taken) > 2:
                raise Stop('another file_replicator replicates to %s: end one of them'
                           % shown(self.options.destination))
        if not self.reasons and now - self.since > 5:
            self.delay = 0.0            # it had lasted
        reason = re.sub(r'\d+', '', str(why))
        if isinstance(why, Drifted):
            self.report.warn('the replica was changed over there (%s): comparing again' % why)
        elif not self.reasons:
            self.report.warn('connection lost: %s; connecting again' % why if self.since else
                             'waiting for the far side: %s' % why)
            self.good_news = 'connected again' if self.since else 'connected'
            self.lost_at, self.reasons = now, {reason}
        elif (now - self.lost_at > REASON_SECONDS and reason not in self.reasons
              and len(self.reasons) < REASONS_MOST):
            self.reasons.add(reason)    # what is to be done may be another thing by now
            self.report.warn('still no connection: %s' % why)
        else:
            self.report.debug('connection', str(why))
        end = now + self.delay
        self.delay = min(5.0, max(0.1, self.delay * 2))
        while time.monotonic() < end:
            fds = [source.watch.fd] if source.watch.fd is not None else []
            select.select(fds, [], [], max(0, end - time.monotonic()))
            source.listen()


# ==== 11. Command line ======================================================================================

DESCRIPTION = '''\
Makes DEST_PARENT_DIR/basename(SRC_DIR) on the far side of CONNECTION_COMMAND the same as SRC_DIR, and keeps
it so. CONNECTION_COMMAND is anything whose standard input reaches a POSIX shell. Nothing is installed there.
'''

EXAMPLES = '''\
examples:
  to a server:              file_replicator.py . /srv ssh host bash
  into a container:         file_replicator.py app /opt docker exec -i NAME sh
  into a service:           file_replicator.py app /opt docker-compose exec -T SERVICE sh
  into a pod:               file_replicator.py app /opt -- kubectl exec -i POD -c main -- sh
  on this machine:          file_replicator.py app /tmp/copies bash
  once, exactly the same:   file_replicator.py --mirror --no-replicate-on-change app /srv ssh host bash

exit status: 0 in step, or stopped as asked; 1 something could not be replicated, or gave up;
  2 the command line is wrong'''


def positive_seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError('%r is no number of seconds above 0' % text)


def exclude_pattern(text: str) -> str:
    try:
        pattern_regex(text)
    except (ValueError, re.error) as error:
        raise argparse.ArgumentTypeError('%r is no pattern: %s' % (text, error))
    return text


class Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        """Where argparse writes. Up to 3.10 it raises OSError; to_stdout raises what main knows."""
        (to_stdout if file is sys.stdout else to_stderr)(message)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog='file_replicator.py', description=DESCRIPTION, epilog=EXAMPLES, add_help=False,
        allow_abbrev=False,
        usage='file_replicator.py [OPTIONS] SRC_DIR DEST_PARENT_DIR CONNECTION_COMMAND...',
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 34, 109))
    yes, no = dict(action='store_true'), dict(action='store_false')

    what = parser.add_argument_group('what is replicated').add_argument
    what('--gitignore', **yes, default=True, help='leave out what git ignores, and .git (default)')
    what('--no-gitignore', **no, dest='gitignore', help='send what git ignores too, and .git')
    what('--exclude', metavar='PATTERN', action='append', default=[], type=exclude_pattern, dest='excludes',
         help='leave out, and never touch there: NAME at any depth, /PATH from SRC_DIR, DIR/ only '
              'directories; * ? [] within a name, ** across (repeatable; default: none)')
    what('--clean-out-first', **yes, dest='clean_out',
         help='empty the replica first, of dot-files and what is left out too (default: no)')
    what('--mirror', **yes, help='also remove what is there and not here (default: no)')
    what('--no-delete', **yes, help='remove nothing there (default: what goes here while it runs goes there)')
    what('--checksum', **yes, help='when connecting compare contents, not size and time (default: no)')
    what('--dry-run', **yes, help='connect, compare, print what would be done, change nothing (default: no)')

    when = parser.add_argument_group('when').add_argument
    when('--with-initial-replication', **yes, dest='initial', default=True,
         help='send what differs at the start (default)')
    when('--no-initial-replication', **no, dest='initial', help='send only what changes later')
    when('--replicate-on-change', **yes, dest='watch', default=True,
         help='watch, and send each change (default)')
    when('--no-replicate-on-change', **no, dest='watch', help='end when all is replicated')
    when('--poll', metavar='SECONDS', type=positive_seconds, default=0,
         help='look at everything at this interval instead of using inotify (default: inotify)')
    when('--update-interval', metavar='SECONDS', type=positive_seconds, default=0,
         help='send a file that keeps changing at most this often (default: each change)')
    when('--wait', **yes,
         help='keep trying if the first connection fails (default: end; a later one is always made '
              'again)')

    after = parser.add_argument_group('after something was replicated').add_argument
    after('--hook', metavar='COMMAND', default='',
          help='run this here, through the shell, where this was started; the paths on its input, '
               'NUL-separated (default: none)')
    after('--remote-hook', metavar='COMMAND', default='',
          help='the same over there, in the replica (default: none)')

    words = parser.add_argument_group('words').add_argument
    words('--quiet', **yes, help='only warnings and errors (default: a line for each path)')
    words('--log-file', metavar='PATH', default='', help='append all lines, with the time (default: no file)')
    words('--debugging', **yes, help='show events and records (default: no)')
    words('--receiver', **yes, help='print what runs over there, and exit')
    words('--version', action='version', version='file_replicator ' + __version__, help='print it, and exit')
    words('--help', action='help', help='print this, and exit')
    return parser


def split_command_line(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Sequence[List[str]]:
    """Options, SRC_DIR and DEST_PARENT_DIR, connection command. By hand, since argparse (3.8 to 3.13) would
    take options out of the command, and drop a -- of its own."""
    takes_value = {name for each in parser._actions if each.nargs is None for name in each.option_strings}
    options: List[str] = []
    places: List[str] = []
    rest = list(argv)
    while rest and rest[0] != '--':
        if rest[0].startswith('-') and rest[0] != '-':
            count = 2 if rest[0] in takes_value else 1
            options.append('='.join(rest[:count]))      # so that a value may begin with a -
            del rest[:count]
        elif len(places) < 2:
            places.append(rest.pop(0))
        else:
            break
    if rest[:1] == ['--']:              # nothing behind it is an option
        del rest[0]
    missing = 2 - len(places)
    places, command = places + rest[:missing], rest[missing:]
    return options, places, command[1:] if command[:1] == ['--'] else command


def parse(argv: Sequence[str]) -> Options:
    parser = make_parser()
    words, places, command = split_command_line(parser, argv)
    given = parser.parse_args(words)
    if given.receiver:
        to_stdout(RECEIVER)
        raise SystemExit(0)
    if len(places) < 2 or not command or not all([*places, command[0]]):
        parser.error('needs SRC_DIR, DEST_PARENT_DIR and CONNECTION_COMMAND, none of them empty; see --help')
    if given.no_delete and (given.mirror or given.clean_out):
        parser.error('--no-delete goes neither with --mirror nor with --clean-out-first')
    if given.clean_out and not given.initial:
        parser.error('--clean-out-first does not go with --no-initial-replication')
    try:
        source = os.path.abspath(places[0])
    except OSError as error:
        parser.error('the current directory is not there: %s' % error.strerror)
    name = os.path.basename(source)
    if not os.path.isdir(source):
        parser.error('SRC_DIR %s is no directory' % shown(places[0]))
    if not name:
        parser.error('SRC_DIR %s cannot be replicated: the replica is named as it is, and it has no name'
                     % shown(places[0]))
    if not places[1].startswith('/'):
        parser.error('DEST_PARENT_DIR %s is not absolute: it has to begin with / (and ~ is not known)'
                     % shown(places[1]))
    given.source, given.destination, given.command = source, places[1].rstrip('/') + '/' + name, command
    given.watch = given.watch and not given.dry_run
    return given


def main(argv: Sequence[str]) -> int:
    def stop(number: int, frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        Signals.asked = True
        if not Signals.held:
            raise Stopped

    # one that is closed is None
    sys.stdout, sys.stderr = (each or open(os.devnull, 'w') for each in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='backslashreplace')
    # entries are never garbage in cycles: looking for that costs a fifth of a scan
    gc.set_threshold(100000)
    try:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:   # as nohup has it
                signal.signal(each, stop)
        return replicate(parse(argv))
    except Stop as why:
        to_stderr('file_replicator: %s\n' % why)
        return 1
    except Stopped:
        return 0
    finally:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        AT_END.close()


if __name__ == '__main__':
    os._exit(main(sys.argv[1:]))        # what we know of a large tree need not be given back piece by piece
