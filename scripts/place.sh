# Where a script works: the storage root in $root and VLAKEEP_ROOT, and a note when the conda environment is another. Sourced, not run.
root="${VLAKEEP_ROOT:-/opt/data/private/vlakeep}"
export VLAKEEP_ROOT="$root"
if [ "${CONDA_DEFAULT_ENV:-}" != "openvla" ]; then
  echo "note: the conda environment 'openvla' is not active (conda activate openvla); using $(command -v "${PYTHON:-python3}")" >&2
fi
