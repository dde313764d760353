"""`trunkline review`: a change judged with evidence, as Markdown for the pull request and as one HTML page.

command.py      what is asked for, in order, and the outcome
snapshot.py     the files of a revision, or of this tree
judge.py        the candidate measured and judged by the base's rules, data and code
tampering.py    what the change does to the judge
changes.py      what differs: stages, data, model card
scores.py       what differs: scores with intervals, and the samples that changed most
latency.py      how fast champion and candidate answer, side by side
charts.py       the figures, as SVG
page.py         Markdown and HTML
"""
