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

name=linux shm= do= role= slot=0 peer=peer peer_slot= seed=1 ticks=10
for word in $(cat /proc/cmdline); do
  case $word in
    name=*|shm=*|do=*|role=*|slot=*|peer=*|seed=*|ticks=*) eval "${word%%=*}='${word#*=}'" ;;
    peer-slot=*) peer_slot=${word#*=} ;;
  esac
done
: "${peer_slot:=$((slot ^ 1))}"
at=${shm%%,*}
size=4096
case $shm in *,*) size=${shm#*,} ;; esac
pages=$((size / 4096))

say() { echo "$name: $*"; }

# Words of page 0: of_slot SLOT OFFSET, offsets as in struct slot.
of_slot() { printf '0x%x' $((at + 128 + 64 * $1 + $2)); }
boots=$(of_slot $slot 0)
my_ping=$(of_slot $slot 8) their_ping=$(of_slot $peer_slot 8)
my_talk=$(of_slot $slot 12) their_talk=$(of_slot $peer_slot 12)
filled=$(printf '0x%x' $((at + 64)))
filled_is=$(printf '0x5853484d%08x' $seed)

get() { echo $(($(devmem $1 32))); }
set_word() { devmem $1 32 $2; }
pause() { usleep 50000; }

# tag PAGE: an odd factor times seed and page, see region_tag(); the shell's numbers are signed.
tag() { printf '0x%016X' $((((seed << 32) + $1 + 1) * -7046029254386353131)); }
word_at() { printf '0x%x' $((at + 4096 * $1 + $2)); }

fill() {
  devmem $filled 64 0
  page=0
  while [ $page -lt $pages ]; do
    devmem $(word_at $page 8) 64 $(tag $page)
    devmem $(word_at $page 4088) 64 $(tag $page)
    page=$((page + 1))
  done
  devmem $filled 64 $filled_is
  say "filled pages=$pages seed=$seed"
}

check() {
  page=0 bad=0
  while [ $page -lt $pages ]; do
    want=$(tag $page)
    [ "$(devmem $(word_at $page 8) 64)" = $want ] && [ "$(devmem $(word_at $page 4088) 64)" = $want ] || bad=$((bad + 1))
    page=$((page + 1))
  done
  say "checked pages=$pages bad=$bad seed=$seed"
}

await_fill() {
  until [ "$(devmem $filled 64)" = "$(echo $filled_is | tr a-f A-F)" ]; do pause; done
  say "fill seen seed=$seed"
}

ping() {
  next=$(get $their_ping) round=0
  while [ $round -lt $ticks ]; do
    next=$((next + 1)) round=$((round + 1))
    set_word $my_ping $next
    until [ "$(get $their_ping)" = $next ]; do pause; done
  done
  say "ping rounds=$ticks last=$next"
}

pong() {
  next=$(get $my_ping) round=0
  while [ $round -lt $ticks ]; do
    next=$((next + 1)) round=$((round + 1))
    until [ "$(get $their_ping)" = $next ]; do pause; done
    set_word $my_ping $next
  done
  say "pong rounds=$ticks last=$next"
}

talk() {
  while :; do
    count=$(($(get $my_talk) + 1))
    set_word $my_talk $count
    say "wrote $count, sees $peer's $(get $their_talk)"
    sleep 1
  done
}

writer() {
  while :; do
    count=$(($(get $my_talk) + 1))
    set_word $my_talk $count
    say "wrote $count"
    sleep 1
  done
}

reader() {
  while :; do
    say "sees $peer's $(get $their_talk)"
    sleep 1
  done
}

count_boot() {
  set_word $boots $(($(get $boots) + 1))
  say "boots=$(get $boots)"
}

say "hello name=$name slot=$slot region=0 shm=$at size=$size"
for verb in $(echo $do $role | tr ',' ' '); do
  case $verb in
    boots) count_boot ;;
    fill|check|ping|pong|talk|writer|reader) $verb ;;
    await-fill) await_fill ;;
    peek) say "peek addr=$at word=$(devmem $at 64)" ;;
    reboot-once) [ "$(get $boots)" = 1 ] && { say reboot; reboot -f; sleep 60; } ;;
    poweroff) say poweroff; poweroff -f; sleep 60 ;;
    reboot) say reboot; reboot -f; sleep 60 ;;
    crash) say crash; echo c > /proc/sysrq-trigger ;;
    shell) setsid cttyhack sh ;;
    stay) while :; do sleep 3600; done ;;
    *) say "error: unknown verb: $verb" ;;
  esac
done
say "done"
while :; do sleep 3600; done
