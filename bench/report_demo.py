"""The README's table of the demo, from the numbers that the demo wrote."""

COLUMNS = ("FID", "KID", "KMMD (95 % interval)", "MV", "diversity", "nearest", "nines")


def render(report: dict | None) -> str:
    """The text between the demo's markers; None where no demo was recorded."""
    if report is None:
        return "No demo recorded yet.\n"
    facts = (
        f"{report['generated']} generated images against {report['real']} held-out nines, seed {report['seed']}, "
        f"{report['minutes']} minutes on {report['device']} with {report['threads']} threads, torch {report['torch']}; "
        f"sparse and random finetuning trained {report['trained_parameters']:.1%} of the generator's parameters.\n"
    )
    lines = [["", *COLUMNS], ["---"] + ["---:"] * len(COLUMNS)]
    for name, row in report["rows"].items():
        low, high = row["kmmd_95%"]
        lines.append([
            name, f"{row['fid']:.2f}", f"{row['kid']:.3f}", f"{row['kmmd']:.3f} ({low:.3f} to {high:.3f})",
            f"{row['mv']:.3f}", f"{row['diversity']:.2f}", f"{row['nearest']:.2f}", f"{row['nines']:.0%}",
        ])  # fmt: skip
    return facts + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
