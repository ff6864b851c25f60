#!/bin/busybox sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Process 1 of a Linux guest of the benchmark: over the test guests' own init, it has vchan_loop run.
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb mount -t devtmpfs dev /dev
for module in /*.ko; do $bb insmod "$module" 2>/dev/null; done
do='' peer=''
for word in $($bb cat /proc/cmdline); do
    case $word in do=*) do=${word#*=} ;; peer=*) peer=${word#*=} ;; esac
done
/bin/vchan_loop "$do" "$peer"
echo "vchan_loop ended with $?"
while :; do $bb sleep 3600; done
