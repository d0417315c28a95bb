// Package access is what every mode with a table of nf_tables has in common: the keys by
// which packets find a frontend, the hooks, the check of a node's facts, and the rules
// that rewrite sources. It gives lists of rules and elements, and never calls back into
// a mode.
package access
