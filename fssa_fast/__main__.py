from fssa_fast.report import environment

print(environment())
