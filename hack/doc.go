// Package hack tests the scripts beside it, which the Makefile runs.
package hack
