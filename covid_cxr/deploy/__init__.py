"From a model to the people who use it"
