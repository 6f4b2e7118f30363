# The DAG of the study. What needs what is declared once, in lib/unmask/workflow.py (CHAPTERS); `./run_all.sh` writes it
# out for one run as data/work/<run>/plan.json, with the files every notebook depends on, and calls Snakemake.
# By hand: snakemake --config plan=data/work/demo/plan.json --cores 1

import json
import signal
from pathlib import Path

# On SLURM a chapter is a step of a job, and SIGUSR1, which reaches all processes of the step, says that the job's time
# runs out. `unmask.jobstep` sees to it; nothing else may die of it.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)

plan = json.loads(Path(config["plan"]).read_text())


rule all:
    input:
        plan["report"],


for chapter in plan["chapters"]:

    rule:
        name:
            chapter["rule"]
        input:
            notebook=chapter["notebook"],
            sources=chapter["sources"],
            needs=chapter["needs"],
        output:
            chapter["results"],
        priority: chapter["priority"]
        params:
            work=plan["work"],
            # Settings, sources and everything upstream, by content: also what the finished results are marked with.
            fingerprint=chapter["fingerprint"],
        resources:
            gres=config.get("gres", "") if chapter["gpu"] else "",
        shell:
            "${{SLURM_JOB_ID:+python3 -m unmask.jobstep}}"
            " python3 -m unmask.headless {input.notebook:q} --work {params.work:q}"
            " --parameter profile {params.work:q}/profile.yaml --fingerprint {params.fingerprint}"


rule report:
    input:
        sources=plan["report_sources"],
        results=[chapter["results"] for chapter in plan["chapters"]],
    output:
        plan["report"],
    localrule: True
    params:
        profile=plan["work"] + "/profile.yaml",
        # The set of chapters: a chapter that was added or taken away changes the page.
        chapters=[chapter["rule"] for chapter in plan["chapters"]],
    shell:
        "python3 -m unmask.report {params.profile:q}"
