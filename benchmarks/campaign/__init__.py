"""Everything that only a GPU can tell, in one command and under nine minutes: what `make gpu` runs.

    python -m fastvit.benchmarks.campaign [--stage NAME,...] [--out FOLDER] [--budget SECONDS] [--dry-run]

Stages run in the order of their importance (stages.py), so that a cut-off costs the least, each in a process of its
own, since a kernel that goes wrong can take its CUDA context with it. A stage must end by the sum of the shares up to
it: what one leaves unspent, the next ones may use, and one that hangs takes nothing from the others.

The folder receives at most eight files, line by line as results come:

    log.jsonl       all that is printed, and how long each kernel took to compile
    tests.jsonl     a line for each test;  tests.log  what pytest printed
    validate.jsonl  a line for each tensor that was held to float64, by the stages limits and validate
    bench.jsonl     ceilings and rows of all suites
    tuning.json     the table of the fastest configurations
    profile.jsonl   a line for each kernel of each profile
    summary.jsonl   device and versions, then status, seconds and key figure of each stage
"""
