// SPDX-License-Identifier: Apache-2.0

//go:build man

package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra/doc"
)

// With the tag man the program writes its man pages into the directory that its
// argument names, and ends. The tag keeps the writer out of the daemon.
func init() {
	// The date of SOURCE_DATE_EPOCH: two builds of one commit are the same.
	header := &doc.GenManHeader{Section: "8", Source: "signalbox " + version, Manual: "signalbox"}
	if err := doc.GenManTree(rootCommand(), header, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "signalbox: man pages:", err)
		os.Exit(1)
	}
	os.Exit(0)
}
