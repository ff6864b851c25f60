#!/bin/busybox sh
# SPDX-License-Identifier: BSD-2-Clause
# The Linux half of the demo: a guest with no driver for shared memory at all.
# It reads and writes the region with busybox's devmem, does the same verbs on
# the same words as the bare-metal guest (region.h), and speaks on hvc0.
# Boot it with iomem=relaxed; README.md lists the parameters.

bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb mount -t devtmpfs dev /dev
$bb --install -s /bin
export PATH=/bin
echo 1 > /proc/sys/kernel/printk    # the console is for us now

name=linux shm='' do=shell role='' slot=0 peer=peer peer_slot='' seed=1 ticks=10
for word in $(cat /proc/cmdline); do
  value=${word#*=}
  case $word in
    name=*) name=$value ;;
    shm=*) shm=$value ;;
    do=*) do=$value ;;
    role=*) role=$value do=${do#shell} ;;
    slot=*) slot=$value ;;
    peer=*) peer=$value ;;
    peer-slot=*) peer_slot=$value ;;
    seed=*) seed=$value ;;
    ticks=*) ticks=$value ;;
  esac
done
: "${peer_slot:=$((slot ^ 1))}"
at=${shm%%,*} size=4096
case $shm in *,*) size=${shm#*,} ;; esac
pages=$((size / 4096))

say() { echo "$name: $*"; }

# Addresses: of a word in a slot of page 0, and of a tag; offsets as in region.h.
in_slot() { printf '0x%x' $((at + 128 + 64 * $1 + $2)); }
in_page() { printf '0x%x' $((at + 4096 * $1 + $2)); }
boots=$(in_slot "$slot" 0)
my_ping=$(in_slot "$slot" 8) their_ping=$(in_slot "$peer_slot" 8)
my_talk=$(in_slot "$slot" 12) their_talk=$(in_slot "$peer_slot" 12)
filled=$(in_page 0 64) filled_value=$(printf '0x5853484D%08X' "$seed")

get() { echo $(($(devmem "$1" 32))); }
set_word() { devmem "$1" 32 "$2"; }
pause() { usleep 50000; }

# region_tag(page, seed), written as devmem writes numbers; the factor is negative because the shell's numbers are signed.
tag() { printf '0x%016X' $((((seed << 32) + $1 + 1) * -7046029254386353131)); }

count_boot() {
  set_word "$boots" $(($(get "$boots") + 1))
  say "boots=$(get "$boots")"
}

fill() {
  devmem "$filled" 64 0
  page=0
  while [ $page -lt $pages ]; do
    devmem "$(in_page $page 8)" 64 "$(tag $page)"
    devmem "$(in_page $page 4088)" 64 "$(tag $page)"
    page=$((page + 1))
  done
  devmem "$filled" 64 "$filled_value"
  say "filled pages=$pages seed=$seed"
}

check() {
  page=0 bad=0
  while [ $page -lt $pages ]; do
    want=$(tag $page)
    if [ "$(devmem "$(in_page $page 8)" 64)" != "$want" ] || [ "$(devmem "$(in_page $page 4088)" 64)" != "$want" ]; then
      bad=$((bad + 1))
    fi
    page=$((page + 1))
  done
  say "checked pages=$pages bad=$bad seed=$seed"
}

await_fill() {
  until [ "$(devmem "$filled" 64)" = "$filled_value" ]; do pause; done
  say "fill seen seed=$seed"
}

ping() {
  next=$(get "$their_ping") round=0
  while [ $round -lt "$ticks" ]; do
    next=$((next + 1)) round=$((round + 1))
    set_word "$my_ping" $next
    until [ "$(get "$their_ping")" = $next ]; do pause; done
  done
  say "ping rounds=$ticks last=$next"
}

pong() {
  next=$(get "$my_ping") round=0
  while [ $round -lt "$ticks" ]; do
    next=$((next + 1)) round=$((round + 1))
    until [ "$(get "$their_ping")" = $next ]; do pause; done
    set_word "$my_ping" $next
  done
  say "pong rounds=$ticks last=$next"
}

# every_second [write] [read]: what a human watches.
every_second() {
  while :; do
    line=''
    case " $* " in *" write "*)
      count=$(($(get "$my_talk") + 1))
      set_word "$my_talk" $count
      line="wrote $count" ;;
    esac
    case " $* " in *" read "*) line="${line:+$line, }sees $peer's $(get "$their_talk")" ;; esac
    say "$line"
    sleep 1
  done
}

leave() {
  say "$1"
  "$1" -f
  sleep 60
}

verb() {
  case $1 in
    poweroff|reboot) leave "$1"; return ;;
    stay) while :; do sleep 3600; done ;;
    shell) setsid cttyhack sh; return ;;
  esac
  [ "$shm" ] || { say "error: no region for: $1"; return; }
  case $1 in
    boots) count_boot ;;
    fill|check|ping|pong) "$1" ;;
    await-fill) await_fill ;;
    peek) say "peek addr=$at word=$(devmem "$at" 64)" ;;
    reboot-once) [ "$(get "$boots")" != 1 ] || leave reboot ;;
    talk) every_second write read ;;
    writer) every_second write ;;
    reader) every_second read ;;
    *) say "error: unknown verb: $1" ;;
  esac
}

say "hello name=$name slot=$slot region=0 shm=$at size=$size"
for word in $(echo "$do" "$role" | tr ',' ' '); do
  verb "$word"
done
say "done"
while :; do sleep 3600; done
