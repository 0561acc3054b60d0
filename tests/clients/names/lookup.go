// Go's resolver, whichever GODEBUG says: the address of each name in a family, as "name 4 name 6 …".
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
)

func main() {
	for i := 1; i+1 < len(os.Args); i += 2 {
		addresses, err := net.DefaultResolver.LookupIP(context.Background(), "ip"+os.Args[i+1], os.Args[i])
		var failure *net.DNSError
		var address *net.AddrError
		switch {
		case err == nil:
			fmt.Println(addresses[0])
		case errors.As(err, &failure) && failure.IsNotFound:
			fmt.Println(failure.Err)
		case errors.As(err, &address):
		fmt.Println(address.Err)
	default:
			fmt.Println(err)
		}
	}
}
