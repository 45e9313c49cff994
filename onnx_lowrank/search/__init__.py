"""From a goal to a finished model: survey the layers, tabulate what they could become, allocate, realise, measure."""
