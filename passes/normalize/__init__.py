"""Graph passes that bring a model into the form the decompositions understand, exactly."""
