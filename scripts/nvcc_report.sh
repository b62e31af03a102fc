#!/bin/sh
# CMake runs nvcc through this. It keeps ptxas's report (registers, spills, shared memory of each
# kernel) in <object>.ptxas, where scripts/compile_check.py reads it, and off the screen.
object=
previous=
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"
"$@" 2>"$object.ptxas"
status=$?
grep -v -E '^ptxas info|bytes stack frame|^$' "$object.ptxas" >&2
exit $status
