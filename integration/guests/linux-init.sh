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
echo "$bb poweroff -f" > /proc/sys/kernel/poweroff_cmd    # what `xl shutdown` has the kernel do

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

say() { echo "$name: $*"; }

# Where a word is: in a slot of page 0, and in any page; offsets as in region.h.
slot_at() { where=$((at + 128 + 64 * $1 + $2)); }
use_region() {
  at=$1 size=$2
  pages=$((size / 4096))
  slot_at "$slot" 0; boots=$where
  slot_at "$slot" 8; my_ping=$where
  slot_at "$slot" 12; my_talk=$where
  slot_at "$peer_slot" 8; their_ping=$where
  slot_at "$peer_slot" 12; their_talk=$where
  filled=$((at + 64)) filled_value=$(((0x5853484d << 32) + seed))
}
at=${shm%%,*} size=4096
case $shm in *,*) size=${shm#*,} ;; esac
use_region "${at:-0}" "$size"

# Every process costs milliseconds under emulation, so these set a variable where others would print.
get() { value=$(($(devmem "$1" "${2:-32}"))); }
set_word() { devmem "$1" 32 "$2"; }
next() { next=$((($1 + 1) & 0xffffffff)); }
pause() { usleep 50000; }

# region_tag(page, seed); the factor is negative because the shell's numbers are signed.
tag() { tag=$((((seed << 32) + $1 + 1) * -7046029254386353131)); }

count_boot() {
  get "$boots"
  next "$value"
  set_word "$boots" $next
  say "boots=$next"
}

fill() {
  devmem $filled 64 0
  page=0
  while [ $page -lt $pages ]; do
    tag $page
    tag=$(printf '0x%x' "$tag")
    devmem $((at + 4096 * page + 8)) 64 "$tag"
    devmem $((at + 4096 * page + 4088)) 64 "$tag"
    page=$((page + 1))
  done
  devmem $filled 64 $filled_value
  say "filled pages=$pages seed=$seed"
}

check() {
  page=0 bad=0
  while [ $page -lt $pages ]; do
    tag $page
    get $((at + 4096 * page + 8)) 64
    first=$value
    get $((at + 4096 * page + 4088)) 64
    [ "$first,$value" = "$tag,$tag" ] || bad=$((bad + 1))
    page=$((page + 1))
  done
  say "checked pages=$pages bad=$bad seed=$seed"
}

await() {
  while get "$1" "$3"; [ "$value" != "$2" ]; do pause; done
}

await_fill() {
  await $filled $filled_value 64
  say "fill seen seed=$seed"
}

ping() {
  get "$their_ping"
  next=$value round=0
  while [ $round -lt "$ticks" ]; do
    next $next
    round=$((round + 1))
    set_word "$my_ping" $next
    await "$their_ping" $next 32
  done
  say "ping rounds=$ticks last=$next"
}

pong() {
  get "$my_ping"
  next=$value round=0
  while [ $round -lt "$ticks" ]; do
    next $next
    round=$((round + 1))
    await "$their_ping" $next 32
    set_word "$my_ping" $next
  done
  say "pong rounds=$ticks last=$next"
}

disk() {
  xshm-disk "$at" "$size" "$ticks" "$seed" 2>&1 | while read -r line; do say "$line"; done
}

# How a guest that was told nothing finds its region: each way says what it found, and uses it.
found() {
  shm=$(printf '0x%x,0x%x' "$(($2))" "$(($3))")
  use_region "${shm%,*}" "${shm#*,}"
  say "found by=$1 shm=$shm"
}

# ask TYPE PATH: one request to xenstored (xs_wire.h), below the guest's own directory.
z='\0000'
zero=$z$z$z$z
ask() {
  length=$(printf '%03o' $((${#2} + 1)))
  printf '%b' "\\000$1$z$z$z$zero$zero\\0$length$z$z$z$2$z" >&3
  answer=$(dd bs=4096 count=1 <&3 2>/dev/null | tail -c +17 | tr '\000' ' ')
}

find_by_xenstore() {
  exec 3<>/dev/xen/xenbus
  ask 1 xshm
  for region in $answer; do
    ask 2 "xshm/$region"
    say "node $region: $answer"
    for word in $answer; do
      case $word in begin=*) begin=${word#*=} ;; size=*) bytes=${word#*=} ;; esac
    done
  done
  found xenstore "$begin" "$bytes"
}

# The highest reserved range of the memory map, if there is one above 4 GiB. Not by /proc/iomem:
# Linux enters reserved ranges there only where it finds PCI.
find_by_memory_map() {
  range=$(dmesg | sed -n 's/.*\[mem 0x\([0-9a-f]*\)-0x\([0-9a-f]*\)\] reserved.*/\1 \2/p' |
    grep -v '^00000000' | tail -n 1)
  if [ -z "$range" ]; then say "nothing reserved above 4 GiB"; return; fi
  begin=0x${range% *} end=0x${range#* }
  found memory-map "$begin" $((end + 1 - begin))
}

find_by_devicetree() {
  for node in /proc/device-tree/passthrough/*@*; do
    [ "$(tr '\000' ' ' < "$node/compatible")" = "xen,shared-memory-v1 " ] || continue
    say "node $(tr '\000' ' ' < "$node/xen,id")"
    reg=$(hexdump -v -e '1/1 "%02x"' "$node/reg")
    found devicetree "0x$(echo "$reg" | cut -c1-16)" "0x$(echo "$reg" | cut -c17-32)"
  done
}

# Regions that the guest maps itself, by their ids; what the helper says, the guest says.
helper() { xshm-guest "$@" 2>&1 | while read -r line; do say "$line"; done; }
await_word() {
  wanted="^got $(printf '0x%x' "$seed")\$"
  until while echo 'get 0'; do pause; done | xshm-guest map -r "$1" 2>&1 | grep -q "$wanted"; do pause; done
  say "seen $seed in $1"
}
once() {
  if echo 'get 0' | xshm-guest map "$1" | grep -q '^got 0$'; then
    granted put "$1"
    leave reboot
  fi
  granted get "$1"
}
await_withdrawal() {
  while xshm-guest list | grep -q "^$1 "; do pause; done
  say "withdrawn $1"
}
granted() {
  [ -e /dev/xen/gntdev ] || insmod /xen-gntdev.ko
  case $1 in
    list) helper list ;;
    put) echo "put 0 $seed" | helper map "$2" ;;
    get) echo 'get 0' | helper map "$2" ;;
    try) echo "put 8 $seed" | helper map -r "$2" ;;
    sum) say "sum $(xshm-guest dump "$2" | md5sum | cut -d' ' -f1) of $2" ;;
    hold) while :; do sleep 3600; done | helper map "$2" & ;;
    once) once "$2" ;;
    await) await_word "$2" ;;
    await-withdrawal) await_withdrawal "$2" ;;
  esac
}

# What dom0 writes into data/member is done, once for each number that it begins with: the word at an
# address is read or written, or Xen is asked what a member's kernel could ask.
member() {
  [ -e /dev/xen/privcmd ] || insmod /xen-privcmd.ko unrestricted=1
  exec 3<>/dev/xen/xenbus
  seen=''
  while :; do
    ask 2 data/member
    case $answer in
      "$seen") ;;
      [0-9]*)
        seen=$answer
        set -- $answer
        number=$1
        shift
        case $1 in
          look) said=$(devmem "$2" 64) ;;
          store) said=$(devmem "$2" 64 "$3" && echo 0) ;;
          *) said=$(xshm-member "$@" 2>&1) ;;
        esac
        say "member $number: $said" ;;
    esac
    pause
  done
}

# every_second [write] [read]: what a human watches.
every_second() {
  while :; do
    line=''
    case " $* " in *" write "*)
      get "$my_talk"
      next "$value"
      set_word "$my_talk" $next
      line="wrote $next" ;;
    esac
    case " $* " in *" read "*)
      get "$their_talk"
      line="${line:+$line, }sees $peer's $value" ;;
    esac
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
    member) member ;;
    find-xenstore) find_by_xenstore; return ;;
    find-memory-map) find_by_memory_map; return ;;
    find-devicetree) find_by_devicetree; return ;;
    granted-*) verb=${1#granted-}; granted "${verb%%:*}" "${verb#*:}"; return ;;
  esac
  [ "$shm" ] || { say "error: no region for: $1"; return; }
  case $1 in
    boots) count_boot ;;
    fill|check|ping|pong|disk) "$1" ;;
    await-fill) await_fill ;;
    peek) say "peek addr=$at word=$(devmem "$at" 64)" ;;
    reboot-once) get "$boots"; [ "$value" != 1 ] || leave reboot ;;
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
