"""Everything that only a GPU can tell, in one command or in two calls of minutes: what `make gpu` runs.

    python -m fastvit.benchmarks.campaign [--call A | --stage NAME,...] [--out FOLDER] [--budget SECONDS] [--dry-run]

Stages run in the order of their importance (stages.py), so that a cut-off costs the least, each in a process of its
own, since a kernel that goes wrong can take its CUDA context with it. A stage must end by the sum of the shares up to
it: what one leaves unspent, the next ones may use, and one that hangs takes nothing from the others. With a budget that
is smaller than all shares together, the last stages run in what the first leave, or not at all. A dry run has the same
code run on a CPU, on the smallest of everything.

The folder receives at most eight files, line by line as results come:

    log.jsonl       all that is printed, and how long each kernel took to compile
    tests.jsonl     a line for each start and each end of a test;  tests.log  what pytest printed
    validate.jsonl  a line for each tensor that was held to float64, by the stages limits_* and validate_*, and for
                    each primitive of the GPU that was held to the emulation
    bench.jsonl     ceilings, rows of all suites and of the sweep, and what calls cost the host
    tuning.json     the table of the fastest configurations
    profile.jsonl   a line for each kernel of each profile
    summary.jsonl   device and versions, then status, seconds and key figure of each stage
"""
