"""One module per operator: `cases(device, quick)` gives its benchmark cases, most important first."""
