"""What Slurm's reasons mean: the word in squeue's last column, in plain English, and what to do about it.

What it is
    `explain("Resources")` gives an `Explanation`. Sources: squeue(1) "JOB REASON CODES", and what the
    words meant on real clusters. A word that is not in the table is explained by its family (QOS…, Assoc…),
    or said to be unknown.

What it does not do
    It asks nobody. The commands hold `{job}`, `{run}`, `{role}` and `{partition}` for the caller to fill.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WAIT, ACT = "note", "problem"
"""Severity: it will pass by itself, or somebody has to do something."""


@dataclass(frozen=True)
class Explanation:
    """`command` is what to type next; "" when waiting is all there is to do."""

    severity: str
    text: str
    command: str = ""


_START = "squeue -j {job} --start"
_SHOW = "scontrol show job {job}"
_LIMITS = "sacctmgr show assoc user=$USER format=account,qos,grptres,maxtres,maxjobs,maxwall"
_QOS = "sacctmgr show qos format=name,maxtrespu,maxjobspu,maxsubmitpu,maxwall,grptres"
_NODES = "sinfo -p {partition} -o '%P %a %l %D %T %G'"
_AGAIN = "orchestrate cancel {run}"

TABLE = {
    "none": Explanation(WAIT, "Slurm has not looked at it yet", _START),
    "resources": Explanation(WAIT, "it is next in line and waits for nodes to become free", _START),
    "priority": Explanation(WAIT, "jobs with a higher priority are in front of it", _START),
    "dependency": Explanation(WAIT, "it waits for another job to start or end", _SHOW),
    "dependencyneversatisfied": Explanation(
        ACT,
        "the job that it depends on failed, so it can never start by itself",
        "scontrol update JobId={job} Dependency=",
    ),
    "jobhelduser": Explanation(ACT, "it is held by its owner and starts when it is released", ""),
    "jobheldadmin": Explanation(ACT, "an administrator (or Slurm itself) holds it; only they can release it"),
    "begintime": Explanation(WAIT, "its earliest start lies in the future (after a requeue: two minutes)"),
    "licenses": Explanation(WAIT, "it waits for a licence", "scontrol show licenses"),
    "partitionnodelimit": Explanation(
        ACT, "it asks for more nodes than the partition may give to one job (or has at all)", _NODES
    ),
    "partitiontimelimit": Explanation(ACT, "its time limit is longer than the partition allows", _NODES),
    "partitiondown": Explanation(WAIT, "the partition is down", _NODES),
    "partitioninactive": Explanation(WAIT, "the partition is switched off", _NODES),
    "partitionconfig": Explanation(
        ACT, "the partition cannot satisfy it: too many nodes, or an account or limit", _NODES
    ),
    "accountnotallowed": Explanation(ACT, "the account may not use this partition or QOS", _LIMITS),
    "qosnotallowed": Explanation(ACT, "the QOS may not be used in this partition or by this account", _QOS),
    "invalidaccount": Explanation(ACT, "there is no such account, or you are not in it", _LIMITS),
    "invalidqos": Explanation(ACT, "there is no such QOS, or you may not use it", _QOS),
    "reqnodenotavail": Explanation(
        WAIT,
        "a node that it needs is down, drained or reserved (maintenance, often)",
        "scontrol show reservation",
    ),
    "reservation": Explanation(WAIT, "it waits for its reservation to begin", "scontrol show reservation"),
    "reservationdeleted": Explanation(ACT, "its reservation was deleted", "scontrol show reservation"),
    "badconstraints": Explanation(ACT, "no node has what it asks for (constraint, memory, GPUs)", _NODES),
    "nodedown": Explanation(WAIT, "a node that it needs is down", "sinfo -R"),
    "jobarraytasklimit": Explanation(WAIT, "another task of its array runs; one at a time is meant"),
    "arraytasklimit": Explanation(WAIT, "another task of its array runs; one at a time is meant"),
    "joblaunchfailure": Explanation(
        ACT,
        "it could not be started: the log or work directory cannot be written there, the node is broken, "
        "or a signal came before the job was ready for it",
        _SHOW,
    ),
    "launchfailedrequeuedheld": Explanation(
        ACT, "it failed to launch (a broken node, often), was requeued, and is held", "scontrol release {job}"
    ),
    "jobrequeued": Explanation(WAIT, "it was requeued and will start again"),
    "jobhold": Explanation(ACT, "it was requeued and is held", "scontrol release {job}"),
    "nonzeroexitcode": Explanation(
        ACT, "its script ended with an exit code other than 0", "orchestrate logs {run}"
    ),
    "raisedsignal": Explanation(ACT, "a signal ended it", "orchestrate logs {run}"),
    "timelimit": Explanation(ACT, "it reached its time limit", "orchestrate resume {run}"),
    "outofmemory": Explanation(ACT, "it used more memory than it asked for", "orchestrate logs {run}"),
    "systemfailure": Explanation(
        ACT, "Slurm, a filesystem or the network failed under it", "orchestrate resume {run}"
    ),
    "inactivelimit": Explanation(ACT, "Slurm ended it because its launcher did not respond"),
    "frontenddown": Explanation(WAIT, "no front-end node is available"),
    "cleaning": Explanation(WAIT, "it was requeued and what is left of its last life is being removed"),
    "prolog": Explanation(WAIT, "the prolog of the node still runs"),
    "powernotavail": Explanation(WAIT, "there is not enough power for it now"),
    "maxpoweredup": Explanation(WAIT, "the number of powered-up nodes is at its limit"),
    "bfresourcereserved": Explanation(WAIT, "nodes are kept for jobs with a higher priority", _START),
    "held": Explanation(ACT, "it is held", "scontrol release {job}"),
}

_FAMILIES = (
    (
        r"qosmaxwall\w*|qos\w*walllimit",
        Explanation(ACT, "its time limit is longer than the QOS allows", _QOS),
    ),
    (
        r"assocmaxwall\w*|assoc\w*walllimit",
        Explanation(ACT, "its time limit is longer than your account allows", _LIMITS),
    ),
    (
        r"qosmax\w*per(job|node)\w*|qosmin\w*",
        Explanation(ACT, "it asks for more (or less) than one job may under this QOS", _QOS),
    ),
    (
        r"assocmax\w*per(job|node)\w*|maxmemperlimit",
        Explanation(ACT, "it asks for more than one job of your account may", _LIMITS),
    ),
    (
        r"qosmax\w*|qosgrp\w*|qosjob\w*|qosresource\w*|qosusage\w*",
        Explanation(
            WAIT, "a limit of the QOS is used up; it starts when other jobs of yours or your group end", _QOS
        ),
    ),
    (
        r"assocgrp\w*|assocmax\w*|association\w*",
        Explanation(
            WAIT, "a limit of your account is used up; it starts when jobs of the account end", _LIMITS
        ),
    ),
    (
        r"req\w*notavail\w*",
        Explanation(WAIT, "something that it asks for is not available now", _NODES),
    ),
)

_LOCAL = {
    "starting": Explanation(WAIT, "it was accepted a moment ago"),
    "accepted": Explanation(WAIT, "it was accepted a moment ago"),
}
_MINUTES = re.compile(r"(assocgrp|qosgrp)\w*(minutes|runmins|billing|mins)\w*")


def normal(reason: str) -> str:
    """The reason as the table spells it: the first part, letters only, in lower case."""
    return re.sub(r"[^a-z]", "", re.split(r"[,(:]", reason.lower().strip("() "))[0])


def explain(reason: str) -> Explanation:
    """What a reason means. Never raises; an unknown word gets an explanation that says so."""
    word = normal(reason)
    if word in ("", "none"):
        return Explanation(WAIT, "the scheduler has not looked at it yet; that takes seconds", _SHOW)
    if (found := TABLE.get(word) or _LOCAL.get(word)) is not None:
        return found
    if _MINUTES.fullmatch(word):
        return Explanation(ACT, "the compute time of your account (or QOS) is spent", _LIMITS)
    for pattern, explanation in _FAMILIES:
        if re.fullmatch(pattern, word):
            return explanation
    return Explanation(WAIT, "this version does not know the reason; the manual page squeue(1) may", _SHOW)
